// The admin's pages: figures that move, links, settings, purging.
import { send } from "./api.js";

const at = (id) => document.getElementById(id);
const told = async (work) => {
  at("problem").textContent = "";
  try { return await work(); } catch (error) { at("problem").textContent = error.message; return null; }
};

// --- overview

const box = at("status");
async function look() {
  let now;
  try {
    const answer = await fetch("/admin/status");
    if (!answer.ok) return;
    now = await answer.json();
  } catch { return; }
  const all = Object.values(now.items).reduce((sum, value) => sum + value, 0);
  const put = (name, value) => { box.querySelector(`[data-figure=${name}]`).textContent = value.toLocaleString("en"); };
  put("ready", now.items.ready);
  put("all", all);
  put("filled", now.filled);
  put("slots", now.slots);
  at("prepared").max = Math.max(all, 1);
  at("prepared").value = now.items.ready + now.items.failed;
  at("answered").max = Math.max(now.slots, 1);
  at("answered").value = now.filled;
  if (box.dataset.running === "yes" && !now.running) location.reload();
}
if (box) setInterval(() => { if (!document.hidden) look(); }, 2500);

// --- people

function showLink({ name, link }) {
  const place = at("new-link");
  place.hidden = false;
  place.querySelector("[data-name]").textContent = name;
  place.querySelector("[data-link]").value = link;
  place.querySelector("[data-link]").select();
  place.scrollIntoView({ block: "nearest" });
}
at("add-person")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const made = await told(() => send("/admin/people", { name: at("name").value, role: at("role").value }));
  if (!made) return;
  at("name").value = "";
  showLink(made); // no reload yet: it would lose the link
});
document.querySelector("[data-copy]")?.addEventListener("click", async (event) => {
  const field = document.querySelector("[data-link]");
  field.select();
  try { await navigator.clipboard.writeText(field.value); } catch { document.execCommand("copy"); }
  event.target.textContent = "Copied";
});
document.querySelector("[data-reload]")?.addEventListener("click", () => location.reload());
for (const button of document.querySelectorAll("[data-act=renew]")) {
  button.addEventListener("click", async () => {
    const id = button.closest("[data-person]").dataset.person;
    const made = await told(() => send(`/admin/people/${id}/renew`, {}));
    if (made) showLink(made);
  });
}
for (const button of document.querySelectorAll("[data-act=revoke]")) {
  button.addEventListener("click", async () => {
    const id = button.closest("[data-person]").dataset.person;
    if (await told(() => send(`/admin/people/${id}/revoke`, {}))) location.reload();
  });
}
const dialog = at("purge-dialog");
for (const button of document.querySelectorAll("[data-act=purge]")) {
  button.addEventListener("click", () => {
    const { person, name } = button.closest("[data-person]").dataset;
    dialog.dataset.person = person;
    dialog.dataset.name = name;
    dialog.querySelector("[data-name]").textContent = name;
    at("purge-name").value = "";
    dialog.querySelector("[data-send]").disabled = true;
    dialog.showModal();
  });
}
at("purge-name")?.addEventListener("input", () => {
  dialog.querySelector("[data-send]").disabled = at("purge-name").value.trim() !== dialog.dataset.name;
});
dialog?.querySelector("[data-send]").addEventListener("click", async () => {
  dialog.close();
  if (await told(() => send(`/admin/people/${dialog.dataset.person}/purge`, {}))) location.reload();
});
dialog?.querySelector("[data-close]").addEventListener("click", () => dialog.close());

// --- settings

const settings = at("settings");
settings?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const saved = await told(() => send("/admin/instructions", {
    instructions: at("instructions").value, labelers_per_item: Number(at("labelers").value), prefill: at("prefill").checked,
  }));
  if (saved) location.assign(saved.next);
});
settings?.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); settings.requestSubmit(); }
});
document.documentElement.dataset.ready = "yes";
