// Light or dark: as the system says, until the reader chooses. Loaded before the page is drawn.
"use strict";

(() => {
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const shown = () => document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const apply = (theme) => {
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  };
  apply(stored());
  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.addEventListener("click", () => {
        const theme = shown() === "dark" ? "light" : "dark";
        apply(theme);
        try { localStorage.setItem("theme", theme); } catch { /* private windows may refuse */ }
      });
    }
  });
})();
