// What a reader of this page meets: texts too faint to read, boxes wider than the page, pictures without words.
// Each function returns lines of text, one for each fault.

const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const knownColours = new Map();

// [red, green, blue, alpha] of any CSS colour, color-mix() and oklch() among them: the browser paints it.
function rgba(colour) {
  if (!knownColours.has(colour)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    knownColours.set(colour, [r, g, b, a / 255]);
  }
  return knownColours.get(colour);
}

function over(top, below) {
  return [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
}

function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(one, other) {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}

// The colour behind an element, and how opaque the element is: layers are collected up to the first opaque one.
function ground(element) {
  const layers = [];
  let opacity = 1;
  for (let node = element; node; node = node.parentElement) {
    const style = getComputedStyle(node);
    opacity *= Number(style.opacity);
    const colour = rgba(style.backgroundColor);
    if (colour[3] > 0) layers.push(colour);
    if (colour[3] === 1) break;
  }
  const paper = rgba(getComputedStyle(document.documentElement).colorScheme === "dark" ? "#121212" : "#ffffff");
  return [layers.reduceRight((below, top) => over(top, below), paper), opacity];
}

// WCAG 1.4.3: 4.5, and 3 from 24 px or from 18.66 px in bold.
function required(style) {
  const size = parseFloat(style.fontSize);
  return size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
}

// Text for screen readers alone is a box of one pixel; a disabled control is exempt.
function seen(element) {
  const { width, height } = element.getBoundingClientRect();
  const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  return shown && width > 1 && height > 1 && !element.closest(":disabled, noscript, svg");
}

function place(element) {
  const parts = [];
  for (let node = element; node && node !== document.body && parts.length < 4; node = node.parentElement) {
    const classes = [...node.classList].slice(0, 2).map((name) => `.${name}`).join("");
    parts.unshift(node.localName + (node.id ? `#${node.id}` : "") + classes);
  }
  return parts.join(" > ");
}

function words(text) {
  return text.trim().replace(/\s+/g, " ").slice(0, 40);
}

// [element, text, style] of all that is read: texts, hints in empty fields, formulas (drawn by ::before).
function* texts() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const formula = element.closest("mjx-container, script, style");
    if (node.data.trim() && !formula) yield [element, node.data, getComputedStyle(element)];
  }
  for (const field of document.querySelectorAll("input[placeholder]"))
    yield [field, field.placeholder, getComputedStyle(field, "::placeholder")];
  for (const formula of document.querySelectorAll("mjx-container"))
    yield [formula, "a formula", getComputedStyle(formula)];
}

// A repeated fault is one line: the first text, and how many more have the same two colours in the same kind of place.
function faint() {
  const faults = new Map();
  for (const [element, text, style] of texts()) {
    if (!seen(element)) continue;
    const [paper, opacity] = ground(element);
    const [r, g, b, a] = rgba(style.color);
    const ink = over([r, g, b, a * opacity], paper);
    const ratio = contrast(ink, paper);
    if (ratio >= required(style)) continue;
    const kind = `${place(element).replace(/#[\w-]+|\d+/g, "")} ${ink.map(Math.round)} on ${paper.map(Math.round)}`;
    const line = `contrast ${ratio.toFixed(2)}: "${words(text)}" in ${place(element)}`;
    const [first, count] = faults.get(kind) ?? [line, 0];
    faults.set(kind, [first, count + 1]);
  }
  return [...faults.values()].map(([line, count]) => (count > 1 ? `${line} (${count} times)` : line));
}

// The nearest box in which an element can be scrolled sideways, or the element.
function scrolled(element, article) {
  for (let node = element.parentElement; node && node !== article; node = node.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(node).overflowX)) return node;
  return element;
}

function wide() {
  const faults = [];
  const article = document.querySelector("article, .bd-article") ?? document.body;
  const edge = article.getBoundingClientRect();
  for (const element of article.querySelectorAll("table, pre, figure, img, mjx-container")) {
    if (!seen(element)) continue;
    // On a phone a table may be scrolled; on a screen it must be seen whole.
    const box = (element.tagName === "TABLE" && innerWidth > 1000 ? element : scrolled(element, article)).getBoundingClientRect();
    if (box.right > edge.right + 1 || box.left < edge.left - 1)
      faults.push(`${place(element)} reaches from ${Math.round(box.left)} to ${Math.round(box.right)} px, ` +
        `the article from ${Math.round(edge.left)} to ${Math.round(edge.right)}`);
  }
  const { scrollWidth, clientWidth } = document.documentElement;   // innerWidth grows with the page on a phone
  if (scrollWidth > clientWidth) faults.push(`the page is ${scrollWidth} px wide in a window of ${clientWidth}`);
  return faults;
}

const SHORTEST = 20;   // characters of a description

// An icon within a button is named by the button; a picture's own path is no description of it.
function wordless() {
  const pictures = [...document.querySelectorAll("img, svg[role=img]:not(button svg)")];
  const described = (one) => {
    const text = one.getAttribute("alt") ?? one.getAttribute("aria-label") ?? "";
    return text === one.getAttribute("src") ? "" : words(text);
  };
  return pictures
    .filter((one) => one.closest("[aria-hidden=true]") === null && described(one).length < SHORTEST)
    .map((one) => `a picture in ${place(one)} is described by "${described(one)}"`);
}

// Formulas that are still TeX or that MathJax refused, and fonts that did not come.
function unset() {
  const raw = [...document.querySelectorAll(".math")].filter((one) => !one.querySelector("mjx-container"));
  const refused = [...document.querySelectorAll("mjx-merror")];
  const fonts = [...document.fonts].filter((font) => font.status === "error");
  return raw.map((one) => `a formula is not set: ${words(one.textContent)}`)
    .concat(refused.map((one) => `a formula is refused: ${words(one.textContent)}`))
    .concat(fonts.map((font) => `the font ${font.family} does not load`));
}
