// gradio has a button for pasting, which browsers allow on localhost and by https alone; Ctrl+V works everywhere.
() => document.addEventListener("paste", event => {
  const inputs = [...document.querySelectorAll("input[type=file]")];
  const free = inputs.find(input => input.parentElement.offsetParent);  // of the open tab, without a photo yet
  if (!free || !event.clipboardData.files.length) return;
  free.files = event.clipboardData.files;
  free.dispatchEvent(new Event("change", {bubbles: true}));
})
