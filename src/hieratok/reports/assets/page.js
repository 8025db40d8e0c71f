const viewer = document.getElementById("viewer");
const pictures = [...document.querySelectorAll(".picture")];
let current = 0;
function show(index) {
  current = (index + pictures.length) % pictures.length;
  const source = pictures[current].firstElementChild;
  viewer.querySelector("img").src = source.src;
  viewer.querySelector("img").alt = source.alt;
  viewer.querySelector("p").textContent = source.alt;
}
pictures.forEach((button, index) => button.addEventListener("click", () => { show(index); viewer.showModal(); }));
viewer.addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => pictures[current].focus());
viewer.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") show(current + 1);
  if (event.key === "ArrowLeft") show(current - 1);
});
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  const block = button.parentElement.querySelector("table, pre");
  button.addEventListener("click", async () => {
    const rows = [...(block.rows ?? [])].map(row => [...row.cells].map(cell => cell.textContent).join("\t"));
    try {
      await navigator.clipboard.writeText(rows.join("\n") || block.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block);  // the browser forbids it: Ctrl+C does the rest
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
