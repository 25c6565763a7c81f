"use strict";
// Versions, bars, search and sorting; a watched page looks for what is new. Without a script the newest versions and
// all samples are there to be read.
const all = (query, within = document) => [...within.querySelectorAll(query)];

function show(list) {
  const words = list.querySelector("[type=search]").value.toLowerCase(), items = all(".item", list);
  for (const item of items) item.hidden = false; // innerText is what is seen
  const texts = items.map((item) => item.innerText.toLowerCase());
  items.forEach((item, i) => {
    item.hidden = !texts[i].includes(words) || (list.dataset.bar ?? item.dataset.bar) !== item.dataset.bar;
  });
  for (const bar of all(".bar", list)) bar.setAttribute("aria-pressed", bar.dataset.bar === list.dataset.bar);
}

function sort(list, value, down) {
  const keyed = all(".item", list).map((item) => [value(item), item]);
  const order = ([a], [b]) => {
    const [x, y] = [a, b].map((text) => (text === "" ? NaN : Number(text.replace("−", "-"))));
    if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? (down ? b : a).localeCompare(down ? a : b) : isNaN(x) - isNaN(y);
    return down ? y - x : x - y;
  };
  for (const [, item] of keyed.sort(order)) item.parentNode.append(item);
}

function turn(slider) {
  const { policy, labels } = slider.dataset;
  slider.parentNode.querySelector("output").textContent = labels.split("\n")[slider.value];
  for (const one of all(".version")) if (one.dataset.policy === policy) one.hidden = one.dataset.at !== slider.value;
}

const reward = (policy) => (item) =>
  all(".version:not([hidden])", item).find((one) => one.dataset.policy === policy)?.dataset.reward ?? "";

function order(choice) {
  const [by, policy] = [choice.value[0], choice.value.slice(1)];
  sort(choice.closest(".list"), by === "=" ? (item) => item.dataset.place : reward(policy), by === ">");
}

document.addEventListener("input", ({ target }) => {
  if (target.matches("[type=range]")) turn(target);
  const list = target.closest(".list");
  if (target.matches("[type=range], select")) order(list.querySelector("select"));
  if (list) show(list);
});

document.addEventListener("click", ({ target }) => {
  const list = target.closest(".list"), bar = target.closest(".bar"), head = target.closest("th button");
  if (bar) {
    if (list.dataset.bar === bar.dataset.bar) delete list.dataset.bar;
    else list.dataset.bar = bar.dataset.bar;
    list.querySelector("details").open = true;
    show(list);
  } else if (head) {
    const heads = all("th", list), column = heads.indexOf(head.closest("th"));
    const down = heads[column].ariaSort === "ascending";
    for (const one of heads) one.ariaSort = "none";
    heads[column].ariaSort = down ? "descending" : "ascending";
    sort(list, (item) => item.cells[column].textContent, down);
  }
});

const STATE = ".list, .list input, .list select, details";

function restore(before) {
  for (const { id, value, newest, open, bar } of before) {
    const one = document.getElementById(id);
    if (!one) continue;
    if (value !== undefined && !newest) one.value = value;
    if (open !== undefined) one.open = open;
    if (bar !== undefined) one.dataset.bar = bar;
  }
  for (const slider of all("[type=range]")) turn(slider);
  for (const choice of all(".list select")) order(choice);
  for (const list of all(".list")) show(list);
}

async function look() {
  const link = document.getElementById("link");
  try {
    const answer = await fetch(location.href, { cache: "no-cache" });
    const { body } = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (body.dataset.watched !== document.body.dataset.watched) {
      const before = all(STATE).map((one) => ({
        id: one.id, value: one.value, newest: one.type === "range" && one.value === one.max, open: one.open, bar: one.dataset.bar,
      }));
      const focused = document.activeElement.id, at = scrollY;
      document.body.replaceWith(body);
      restore(before);
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
      scrollTo(0, at);
    } else link.textContent = "Live: what is new appears here by itself.";
  } catch {
    link.textContent = "plumbline watch does not answer any more; this is how the run stood.";
  }
  setTimeout(look, 5000);
}

document.documentElement.classList.add("js");
if (document.body.dataset.watched) setTimeout(look, 5000);
