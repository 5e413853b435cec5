// The start page: Enter goes on. A page that waits for something looks again by itself.
import { isField, send } from "./api.js";

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !isField(event.target) && !event.target.closest?.("a, button")) {
    document.getElementById("start")?.click();
  }
});
document.getElementById("leave")?.addEventListener("click", async () => {
  const { next } = await send("/leave", {});
  location.assign(next);
});
const again = Number(document.body.dataset.checkAgain || 0);
if (again) setTimeout(() => location.reload(), again * 1000);
