/* The interactive page: Eq. 7, its minimum, and two drawings of them.
 *
 * Numbers agree with keras_ptloss.proxy_teacher inside the region where the
 * loss is convex, epsilon_m >= -1/m, to which the sliders keep.
 */
"use strict";

const ptloss = (() => {
  /* sum_m epsilon_m s^m, by Horner's rule. */
  function perturbation(s, epsilon) {
    return s * epsilon.reduceRight((value, e) => value * s + e, 0);
  }

  /* h = sum_m m epsilon_m s^(m-1). */
  function slope(s, epsilon) {
    return epsilon.reduceRight((value, e, i) => value * s + (i + 1) * e, 0);
  }

  /* Eq. 7 of a row; epsilon has one list of coefficients a class. */
  function loss(t, p, epsilon) {
    return t.reduce((sum, tc, c) => {
      if (tc === 0) return sum;
      const kl = Math.log(tc) - Math.log(p[c]);
      return sum + tc * (kl + perturbation(1 - p[c], epsilon[c]));
    }, 0);
  }

  /* The x in [low, high] at which a falling function reaches `level`. */
  function reach(falling, level, low, high) {
    for (let i = 0; i < 200 && high - low > 1e-16 * high; i++) {
      const middle = (low + high) / 2;
      if (falling(middle) > level) low = middle;
      else high = middle;
    }
    return (low + high) / 2;
  }

  /* Eq. 8-10. Where the loss is convex, t_c (1/q + h_c(q)) falls with q, and so
   * does the q_c at which it is nu, with nu: bisect for the nu that makes the
   * q add up to 1, and for each class within. */
  function proxyTeacher(t, epsilon) {
    const at = (nu) =>
      t.map((tc, c) => {
        if (tc === 0) return 0;
        const gradient = (q) => tc * (1 / q + slope(1 - q, epsilon[c]));
        return gradient(1) >= nu ? 1 : reach(gradient, nu, 1e-300, 1);
      });
    const sum = (row) => row.reduce((a, b) => a + b, 0);
    let high = 1;
    while (sum(at(high)) > 1) high *= 2;
    const q = at(reach((nu) => sum(at(nu)), 1, 0, high));
    const total = sum(q);
    return q.map((value) => value / total);
  }

  return { loss, proxyTeacher };
})();

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function draw(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) {
      element.setAttribute(key, value);
    }
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  }

  const path = (points) =>
    "M" + points.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L");

  /* Read the sliders whose names are given, and show their values. */
  function read(root, names) {
    return names.map((name) => {
      const input = root.querySelector(`input[name="${name}"]`);
      const value = Number(input.value);
      input.parentElement.querySelector("output").textContent =
        value.toFixed(2);
      return value;
    });
  }

  /* Keep full digits for those who read the page by a program. */
  function report(root, text, values) {
    const line = root.querySelector(".readout");
    line.textContent = text;
    line.dataset.values = JSON.stringify(values);
  }

  function curves(root) {
    const left = 46, right = 410, top = 10, bottom = 240, height = 2;
    const svg = root.querySelector("svg");
    const x = (p) => left + (right - left) * p;
    const y = (value) => bottom - ((bottom - top) * value) / height;
    for (let p = 0; p <= 1; p += 0.25) {
      draw(svg, "path", { class: "grid", d: `M${x(p)} ${top}V${bottom}` });
      draw(svg, "text", { x: x(p), y: bottom + 18, class: "middle" }, p);
    }
    for (let value = 0; value <= height; value += 0.5) {
      draw(svg, "path", { class: "grid", d: `M${left} ${y(value)}H${right}` });
      draw(svg, "text", { x: left - 6, y: y(value) + 4, class: "end" }, value);
    }
    draw(svg, "text", { x: x(0.5), y: bottom + 38, class: "middle" },
      "student's probability p of class 1");
    draw(svg, "text",
      { x: 0, y: 0, class: "middle", transform: "translate(12 125)rotate(-90)" },
      "loss above its minimum, nats");
    const clip = draw(svg, "clipPath", { id: "ptloss-plot" });
    draw(clip, "rect",
      { x: left, y: top - 4, width: right - left, height: bottom - top + 12 });
    const plot = draw(svg, "g", { "clip-path": "url(#ptloss-plot)" });
    const kl = draw(plot, "path", { class: "teacher line" });
    const pt = draw(plot, "path", { class: "proxy line" });
    const teacher = draw(plot, "circle", { class: "teacher", r: 6 });
    const proxy = draw(plot, "circle", { class: "proxy", r: 6 });

    function update() {
      const [t, ...shared] = read(root, ["t", "e1", "e2", "e3"]);
      const row = [t, 1 - t], epsilon = [shared, shared];
      const q = ptloss.proxyTeacher(row, epsilon);
      const least = ptloss.loss(row, q, epsilon);
      const points = (above) => {
        const all = [];
        for (let i = 1; i < 400; i++) all.push([x(i / 400), y(above(i / 400))]);
        return path(all);
      };
      const none = [[], []];
      kl.setAttribute("d", points((p) => ptloss.loss(row, [p, 1 - p], none)));
      pt.setAttribute("d",
        points((p) => ptloss.loss(row, [p, 1 - p], epsilon) - least));
      teacher.setAttribute("cx", x(t));
      proxy.setAttribute("cx", x(q[0]));
      for (const dot of [teacher, proxy]) dot.setAttribute("cy", y(0));
      report(root,
        `teacher t = ${t.toFixed(3)}, proxy q = ${q[0].toFixed(3)}, ` +
        `least loss ${least.toFixed(3)} nats`,
        { t, epsilon: shared, q, least });
    }
    root.addEventListener("input", update);
    update();
  }

  function triangle(root) {
    const corners = [[210, 30], [30, 330], [390, 330]];
    const svg = root.querySelector("svg");
    const place = (row) =>
      [0, 1].map((i) => row.reduce((s, v, c) => s + v * corners[c][i], 0));
    draw(svg, "path", { class: "edge", d: path(corners) + "Z" });
    for (let k = 1; k < 4; k++) {
      const [a, b] = [k / 4, 1 - k / 4];
      for (const ends of [[[a, b, 0], [a, 0, b]], [[b, a, 0], [0, a, b]],
        [[b, 0, a], [0, b, a]]]) {
        draw(svg, "path", { class: "grid", d: path(ends.map(place)) });
      }
    }
    ["class 1", "class 2", "class 3"].forEach((name, c) =>
      draw(svg, "text", { x: corners[c][0], y: corners[c][1] + (c ? 22 : -12),
        class: c === 0 ? "middle" : c === 1 ? "start" : "end" }, name));
    const flow = draw(svg, "path", { class: "flow" });
    const arrow = draw(svg, "path", { class: "proxy line" });
    const proxy = draw(svg, "circle", { class: "proxy", r: 8 });
    const teacher = draw(svg, "circle", {
      class: "teacher handle", r: 11, tabindex: 0, role: "slider",
      "aria-label": "teacher; drag it, or move it by the arrow keys",
    });
    let t = [0.5, 0.3, 0.2];

    function update() {
      const perClass = read(root, ["c1", "c2", "c3"]).map((e) => [e]);
      const q = ptloss.proxyTeacher(t, perClass);
      const steps = [];
      for (let i = 1; i < 10; i++) {
        for (let j = 1; i + j < 10; j++) {
          const from = [i / 10, j / 10, (10 - i - j) / 10];
          const to = ptloss.proxyTeacher(from, perClass);
          steps.push(path([place(from), place(to)]));
        }
      }
      flow.setAttribute("d", steps.join(""));
      arrow.setAttribute("d", path([place(t), place(q)]));
      for (const [dot, row] of [[teacher, t], [proxy, q]]) {
        const [cx, cy] = place(row);
        dot.setAttribute("cx", cx);
        dot.setAttribute("cy", cy);
      }
      const text = (row) => row.map((value) => value.toFixed(3)).join(", ");
      teacher.setAttribute("aria-valuetext", text(t));
      report(root, `teacher (${text(t)}), proxy (${text(q)})`,
        { t, epsilon: perClass, q });
    }

    /* The nearest teacher that rules no class out. */
    function moveTo(row) {
      const kept = row.map((value) => Math.max(value, 0.001));
      const total = kept.reduce((a, b) => a + b, 0);
      t = kept.map((value) => value / total);
      update();
    }

    function toRow(event) {
      const at = new DOMPoint(event.clientX, event.clientY)
        .matrixTransform(svg.getScreenCTM().inverse());
      const [[ax, ay], [bx, by], [cx, cy]] = corners;
      const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
      const first = ((by - cy) * (at.x - cx) + (cx - bx) * (at.y - cy)) / area;
      const second = ((cy - ay) * (at.x - cx) + (ax - cx) * (at.y - cy)) / area;
      return [first, second, 1 - first - second];
    }

    teacher.addEventListener("pointerdown", (event) => {
      teacher.setPointerCapture(event.pointerId);
      event.preventDefault();
      teacher.focus();
    });
    teacher.addEventListener("pointermove", (event) => {
      if (teacher.hasPointerCapture(event.pointerId)) moveTo(toRow(event));
    });
    teacher.addEventListener("keydown", (event) => {
      const move = {
        ArrowUp: [0.02, -0.01, -0.01], ArrowDown: [-0.02, 0.01, 0.01],
        ArrowLeft: [0, 0.02, -0.02], ArrowRight: [0, -0.02, 0.02],
      }[event.key];
      if (!move) return;
      event.preventDefault();
      moveTo(t.map((value, c) => value + move[c]));
    });
    root.addEventListener("input", update);
    update();
  }

  for (const [id, start] of [["curves", curves], ["triangle", triangle]]) {
    const root = document.getElementById(`ptloss-${id}`);
    if (root) start(root);
  }
})();
