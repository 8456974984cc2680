// Applies the kept theme before anything is painted: a classic script in the head, since modules come later.
(() => {
  const kept = localStorage.getItem("drex-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
