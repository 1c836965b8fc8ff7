// Search and order of the samples, which the address keeps: #search=word&order=-verdict
const form = document.getElementById("controls"), list = document.getElementById("rows"), rows = [...list.children];
const texts = rows.map(row => [...row.querySelectorAll(".text")].map(part => part.textContent).join("\n").toLowerCase());
function show() {
  const asked = new URLSearchParams(location.hash.slice(1)), order = asked.get("order") ?? "";
  const key = order.replace("-", ""), rank = row => row.dataset[key] ? row.dataset[key] * (key === order || -1) : Infinity;
  form.search.value = asked.get("search") ?? "";
  form.order.value = order;
  rows.forEach((row, n) => row.hidden = !texts[n].includes(form.search.value.toLowerCase()));
  list.replaceChildren(...[...rows].sort((a, b) => rank(a) - rank(b) || 0));
  form.count.value = `${rows.filter(row => !row.hidden).length} shown`;
}
form.addEventListener("input", () => location.replace("#" + new URLSearchParams(new FormData(form))));
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", show);
form.hidden = false;
show();
