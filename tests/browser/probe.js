// Runs at the end of a copy of the page, after everything that the page's own text might have started.
function channels(colour) {
  const numbers = colour.match(/[\d.]+/g).map(Number);
  return { rgb: numbers.slice(0, 3), alpha: numbers.length > 3 ? numbers[3] : 1 };
}
function luminance(rgb) {
  const [r, g, b] = rgb.map(value => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (let at = element; at; at = at.parentElement) {
    const { rgb, alpha } = channels(getComputedStyle(at).backgroundColor);
    if (alpha === 1) return rgb;
  }
  return [255, 255, 255];
}
// Contrast ratio of WCAG 2.2, 1.4.3.
function contrast(element) {
  const style = getComputedStyle(element);
  const ink = luminance(channels(element.closest("svg") ? style.fill : style.color).rgb);
  const paper = luminance(background(element));
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}
function texts() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const { textContent, parentElement } = walker.currentNode;
    if (textContent.trim() && parentElement.getClientRects().length && !parentElement.closest("script, title, desc"))
      found.push(parentElement);
  }
  return [...new Set(found)];
}
function looks(element) {
  const style = getComputedStyle(element);
  const { textDecorationLine, textDecorationThickness, backgroundColor, color } = style;
  return { text: element.textContent, line: textDecorationLine, thickness: textDecorationThickness, backgroundColor, color };
}
function report() {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const page = document.documentElement;
  const lowest = texts().map(element => [contrast(element), element.textContent.slice(0, 60)]).sort((a, b) => a[0] - b[0]);
  const plot = document.querySelector(".plot");
  const limit = document.querySelector(".plot .limit");
  parent.postMessage({
    name: NAME,
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    overflow: page.scrollWidth - page.clientWidth,
    title: document.title,
    pwned: document.body.dataset.pwned ?? "no",
    scripts: document.scripts.length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    lowest: lowest[0],
    num_texts: lowest.length,
    marks: [...document.querySelectorAll("mark")].map(looks),
    unmarked: [...document.querySelectorAll(".text span:not(.newline)")].map(looks),
    ledger: document.getElementById("ledger-table")?.innerText,
    segments: [...document.querySelectorAll(".bar")].map(bar => [...bar.children].map(part => part.offsetWidth)),
    bars: [...document.querySelectorAll(".bar")].map(bar => bar.offsetWidth),
    limit: limit ? (limit.getBoundingClientRect().left - plot.getBoundingClientRect().left) / plot.clientWidth : null,
    rects: [...document.querySelectorAll(".plot rect")].map(rect => rect.getBoundingClientRect().height),
    smallest: Math.min(...texts().map(element => parseFloat(getComputedStyle(element).fontSize))),
    body: document.body.innerText,
  }, "*");
}
addEventListener("load", () => setTimeout(report));
