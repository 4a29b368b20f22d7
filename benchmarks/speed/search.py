"""What the search costs: our Newton, the paper's fsolve, and modern solvers.

    KERAS_BACKEND=jax python benchmarks/speed/search.py \
        --output benchmarks/results/search.md

Proxy teachers of Dirichlet(0.3) teachers, M = 5, by class count; the search
end to end; and searches by gradient, per class and cross-validated, with their
memory, each in a process of its own. Writes a Markdown report, and a PNG beside
it. The rivals on JAX (optimistix, a vmapped dense Newton) run with
KERAS_BACKEND=jax only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
import warnings

import keras
import matplotlib
import numpy as np
from machine import load_average, machine, resident

from keras_ptloss import ProxyTeacherSearch
from keras_ptloss._cores import block_elements
from keras_ptloss._perturbation import perturbation, slope
from keras_ptloss.proxy._blocks import solve_newton
from keras_ptloss.proxy._fsolve import _fsolve_row
from keras_ptloss.search import GradientSearch, RandomSearch

matplotlib.use("Agg")

TOLERANCE = 1e-6
ORDER = 5
OURS = "newton"
PUBLISHED = "fsolve, all C logits"
FIXED = "fsolve, gauge fixed"
JAX_RIVALS = ("optimistix Newton", "optimistix BFGS", "vmapped JAX Newton")

HEADER = """# The search for proxy teachers: cost

`KERAS_BACKEND={backend} python benchmarks/speed/search.py --output {output}`

{machine}
Seed {seed}. Teachers: {rows} rows from Dirichlet(0.3); epsilon shared by the
classes, M = {order}, uniform in [-1, 10].

* `newton` is `solve_newton` in float64 on chunks of candidates, as
  `ProxyTeacherSearch` calls it (own tolerance 1e-12): {candidates} candidates
  x {rows} rows ({few} candidates at C = 1000).
* `fsolve` is the paper's Appendix A.3, SciPy's fsolve with the analytic
  Jacobian from x0 = log t, `_fsolve_row` of `solve_fsolve` (xtol 1e-8, at most
  100 C calls), on a subsample of (candidate, row) pairs; each of its two forms
  stops after {budget:.0f} s and its count says how many it got to. "All C
  logits" is as published, "gauge fixed" drops one logit.
* Rivals in float64, vmapped over pairs and jitted, in blocks of one compiled
  shape, gauge-fixed logits, from log t: optimistix `root_find` with `Newton`
  and `minimise` with `BFGS` (rtol = atol = 1e-8, at most 100 and 1,000 steps;
  with 100 BFGS converges on no row at C = 100); and dense Newton steps by
  `jax.hessian` and `linalg.solve`, 20 of them, undamped.
* Times are medians of {repeats} interleaved repeats, compilation apart (fsolve
  once where a repeat takes over {once:.0f} s). Every solver is judged alike:
  converged where max |w - q sum w| / sum t (1 + |q h|) is at most 1e-6 and
  the loss is not above the teacher's own.
"""


def teachers(rows, classes, seed):
    """Return teachers' probabilities `(rows, classes)`."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(classes, 0.3), size=rows)


def converged(t, q, coefficients):
    """Judge rows `(..., C)`: stationary, and no worse than the teacher."""
    q_h = q * slope(1 - q, coefficients)
    w = t * (1 + q_h)
    gap = np.abs(w - q * w.sum(axis=-1, keepdims=True)).max(axis=-1)
    residual = gap / np.sum(t * (1 + np.abs(q_h)), axis=-1)

    def loss(p):
        terms = perturbation(1 - p, coefficients)
        terms = terms - np.log(np.maximum(p, np.finfo("float64").tiny))
        return np.sum(t * terms, axis=-1)

    own = loss(t)
    within = loss(q) <= own + 1e-9 * (1 + np.abs(own))
    return (residual <= TOLERANCE) & within & np.isfinite(q).all(axis=-1)


def newton(teacher, epsilons, judge=None):
    """Solve all epsilons `(K, 1 or C, M)` chunk by chunk, as the search does.

    Returns:
        Seconds a solve (judging apart) and, with `judge`, what it returns for
        each chunk's epsilons and proxy teachers.
    """
    at_once = min(len(epsilons), max(1, block_elements() // 4 // teacher.size))
    padded = np.concatenate(
        [epsilons, np.zeros((-len(epsilons) % at_once, *epsilons.shape[1:]))]
    )
    seconds, verdicts = 0.0, []
    for start in range(0, len(padded), at_once):
        chunk = padded[start : start + at_once]
        begin = time.perf_counter()
        q, *_ = solve_newton(teacher, chunk, tolerance=1e-12, max_steps=100)
        seconds += time.perf_counter() - begin
        if judge:
            keep = min(at_once, len(epsilons) - start)
            verdicts.append(judge(chunk[:keep], q[:keep]))
    return seconds / (len(epsilons) * len(teacher)), verdicts


def share_converged(teacher, epsilons):
    """Return the share of `newton`'s rows that converged, and their number."""

    def judge(chunk, q):
        coefficients = [chunk[:, None, :, m] for m in range(chunk.shape[-1])]
        return converged(teacher, q, coefficients)

    verdict = np.concatenate(newton(teacher, epsilons, judge)[1])
    return verdict.mean(), int(np.sum(~verdict)), verdict.size


def fsolve(t, epsilons, fix_gauge, budget):
    """Solve pairs `(P, C)`, `(P, M)` one by one; return seconds and `q`."""
    proxies = []
    begin = time.perf_counter()
    for row, epsilon in zip(t, epsilons, strict=True):
        q, _ = _fsolve_row(
            row, list(epsilon), 0.01 * TOLERANCE, 100 * len(row), fix_gauge
        )
        proxies.append(q)
        if time.perf_counter() - begin > budget:
            break
    return (time.perf_counter() - begin) / len(proxies), np.stack(proxies)


def jax_rivals(block):
    """Return `{name: function of pairs (P, C), (P, M) -> q}`, compiled."""
    import jax
    import jax.numpy as jnp
    import optimistix

    def full(x, start):
        return jnp.concatenate([x, start[-1:]])

    def loss(x, arguments):
        t, epsilon = arguments
        log_q = jax.nn.log_softmax(full(x, jnp.log(t)))
        terms = perturbation(1 - jnp.exp(log_q), list(epsilon)) - log_q
        return jnp.sum(t * terms)

    def optimistix_newton(x, arguments):
        return optimistix.root_find(
            jax.grad(loss),
            optimistix.Newton(rtol=1e-8, atol=1e-8),
            x,
            arguments,
            max_steps=100,
            throw=False,
        ).value

    def optimistix_bfgs(x, arguments):
        return optimistix.minimise(
            loss,
            optimistix.BFGS(rtol=1e-8, atol=1e-8),
            x,
            arguments,
            max_steps=1000,
            throw=False,
        ).value

    def dense_newton(x, arguments):
        def step(_, x):
            gradient = jax.grad(loss)(x, arguments)
            hessian = jax.hessian(loss)(x, arguments)
            return x - jnp.linalg.solve(hessian, gradient)

        return jax.lax.fori_loop(0, 20, step, x)

    def batched(solve):
        def one(t, epsilon):
            t = jnp.maximum(t, 1e-300)
            start = jnp.log(t)
            x = solve(start[:-1], (t, epsilon))
            return jax.nn.softmax(full(x, start))

        compiled = jax.jit(jax.vmap(one))

        def run(t, epsilons):
            with jax.enable_x64(True):
                return np.concatenate(
                    [
                        compiled(t[i : i + block], epsilons[i : i + block])
                        for i in range(0, len(t), block)
                    ]
                )

        return run

    solvers = (optimistix_newton, optimistix_bfgs, dense_newton)
    return dict(zip(JAX_RIVALS, map(batched, solvers), strict=True))


def solvers_at(classes, arguments):
    """Time every solver at one class count; return `{solver: facts}`."""
    teacher = teachers(arguments.rows, classes, arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    count = arguments.few if classes >= 1000 else arguments.candidates
    epsilons = generator.uniform(-1, 10, size=(count, 1, ORDER))

    def pairs(number):
        candidate = generator.integers(count, size=number)
        row = generator.integers(len(teacher), size=number)
        return teacher[row], epsilons[candidate, 0]

    def judge(sample, q):
        t, epsilon = (part[: len(q)] for part in sample)
        return converged(t, q, list(epsilon.T[:, :, None])).mean()

    facts, seconds = {}, {}
    begin = time.perf_counter()
    first, _ = newton(teacher, epsilons)
    share, missed, solves = share_converged(teacher, epsilons)
    facts[OURS] = {"solves": solves, "share": share, "missed": missed}
    seconds[OURS] = []
    compile_of = {OURS: first * solves}

    number = 200 if classes <= 10 else 60 if classes <= 100 else 4
    slow = pairs(number)
    block = 1000 if classes <= 10 else 100
    quick = pairs(10 * block if classes <= 10 else 5 * block)
    rivals = {}
    if classes <= 100 and keras.backend.backend() == "jax":
        rivals = jax_rivals(block)
    for name, solve in rivals.items():
        begin = time.perf_counter()
        q = solve(*quick)
        compile_of[name] = time.perf_counter() - begin
        facts[name] = {"solves": len(q), "share": judge(quick, q)}
        seconds[name] = []

    for repeat in range(arguments.repeats):
        seconds[OURS].append(newton(teacher, epsilons)[0])
        for name, fix_gauge in ((PUBLISHED, False), (FIXED, True)):
            spent = seconds.setdefault(name, [])
            if repeat and spent[0] * number > arguments.once:
                continue
            each, q = fsolve(*slow, fix_gauge, arguments.budget)
            spent.append(each)
            facts[name] = {"solves": len(q), "share": judge(slow, q)}
        for name, solve in rivals.items():
            begin = time.perf_counter()
            solve(*quick)
            seconds[name].append((time.perf_counter() - begin) / len(quick[0]))

    ours = np.array(seconds[OURS])
    for name, values in seconds.items():
        each = np.array(values)
        facts[name] |= {
            "seconds": np.median(each),
            # Repeat by repeat; the median of ours where fsolve ran once.
            "ratio": np.quantile(
                each / (ours if len(each) == len(ours) else np.median(ours)),
                [0.5, 0.25, 0.75],
            ),
            "compile": compile_of.get(name, 0.0)
            - np.median(each) * facts[name]["solves"] * (name in compile_of),
        }
        print(classes, name, facts[name], flush=True)
    return facts


def digits(value):
    """Write a number with three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def solver_table(results):
    """Return the Markdown lines of `{classes: {solver: facts}}`."""
    lines = [
        "",
        "## Time for a solve",
        "",
        "| C | solver | solves | µs a solve | ratio to newton [quartiles] "
        "| converged | compilation, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for classes, facts in results.items():
        for name in (OURS, PUBLISHED, FIXED, *JAX_RIVALS):
            if name not in facts:
                continue
            f = facts[name]
            share = f"{100 * f['share']:.1f} %"
            if name == OURS and f["missed"]:
                share = f"all but {f['missed']}"
            ratio, low, high = f["ratio"]
            compilation = f"{max(f['compile'], 0):.1f}" if f["compile"] else "-"
            lines.append(
                f"| {classes} | {name} | {f['solves']:,} "
                f"| {digits(1e6 * f['seconds'])} | **{digits(ratio)}** "
                f"[{digits(low)}, {digits(high)}] | {share} | {compilation} |"
            )
    return lines


def convex_table(arguments):
    """Count unconverged rows where every epsilon_m >= -1/m."""
    lines = [
        "",
        "## Rows that did not converge where the loss is convex",
        "",
        "`newton`, epsilon_m uniform in [-1/m, 10], same judge.",
        "",
        "| C | epsilon | solves | not converged |",
        "|---|---|---|---|",
    ]
    low = -1.0 / np.arange(1, ORDER + 1)
    for classes in arguments.classes:
        teacher = teachers(arguments.rows, classes, arguments.seed)
        count = arguments.few if classes >= 1000 else arguments.candidates
        for shape, rows in (("shared", 1), ("per class", classes)):
            generator = np.random.default_rng(arguments.seed + 1)
            epsilons = generator.uniform(low, 10.0, size=(count, rows, ORDER))
            _, missed, solves = share_converged(teacher, epsilons)
            lines.append(f"| {classes} | {shape} | {solves:,} | {missed} |")
            print(lines[-1], flush=True)
    return lines


def end_to_end(results, arguments):
    """Time Algorithm 1 as a user calls it; return Markdown lines."""
    lines = [
        "",
        "## Algorithm 1, end to end",
        "",
        f"`ProxyTeacherSearch(RandomSearch(order={ORDER}))` on "
        f'{arguments.rows} rows, 500 trials; "later calls" is the median of '
        f"{arguments.repeats}. fsolve (gauge fixed) is the solves times its "
        "time above, not run.",
        "",
        "| C | first call, s | later calls, s | rows not converged (1e-12) "
        "| fsolve, extrapolated, s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for classes in (3, 100):
        if classes not in results:
            continue
        teacher = teachers(arguments.rows, classes, arguments.seed)
        labels = np.argmax(teacher, axis=1)
        search = ProxyTeacherSearch(RandomSearch(order=ORDER))
        found = [
            search.search(teacher, labels, verbose=False)
            for _ in range(arguments.repeats + 1)
        ]
        later = np.median([result.seconds for result in found[1:]])
        theirs = found[0].solves * results[classes][FIXED]["seconds"]
        lines.append(
            f"| {classes} | {found[0].seconds:.2f} | {later:.2f} "
            f"| {found[0].unconverged} of {found[0].solves:,} "
            f"| {theirs:,.0f} | {theirs / later:,.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


# Of the searches by gradient: the arguments, by the name in the table.
FORMS = {
    "per class": GradientSearch(per_class=True, penalty=0.01),
    "cross-validated": "cross_validation",
}


def gradient_search(form, classes, rows, seed):
    """Search by gradient on biased teachers; print the cost."""
    classes, rows, seed = int(classes), int(rows), int(seed)
    generator = np.random.default_rng(seed)
    truth = generator.dirichlet(np.full(classes, 0.3), size=rows)
    chance = truth.cumsum(axis=1)
    labels = (generator.uniform(size=(rows, 1)) > chance).sum(axis=1)
    labels = np.minimum(labels, classes - 1)
    teacher = truth * np.exp(generator.normal(size=classes))
    teacher /= teacher.sum(axis=1, keepdims=True)
    before = resident("VmHWM") / 1024
    warnings.filterwarnings("ignore", message=".*labelled examples")
    result = ProxyTeacherSearch(FORMS[form]).search(teacher, labels)
    peak = resident("VmHWM") / 1024
    print(
        json.dumps(
            {
                "seconds": result.seconds,
                "peak": peak,
                "before": before,
                "evaluations": result.solves // rows,
                "unconverged": result.unconverged,
                "score": result.score,
                "score_at_zero": result.score_at_zero,
            }
        )
    )


def gradient_table(arguments):
    """Run `gradient_search` in processes of their own."""
    lines = [
        "",
        "## Searches by gradient",
        "",
        "Per class is `GradientSearch(per_class=True, penalty=0.01)`, "
        "cross-validated `ProxyTeacherSearch()`, on 5 folds. "
        f"M = {ORDER}; teachers are the truth (Dirichlet(0.3)) times a weight "
        "a class, exp(normal); compilation included. Memory is the peak of the "
        "resident set of the process (VmHWM), and what it was with the data "
        "made, before the search.",
        "",
        "| search | C | N | seconds | evaluations | peak GiB | before GiB "
        "| rows not converged | NLL, plain KL -> found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    searches = [("per class", *size) for size in arguments.gradient]
    searches += [("cross-validated", *size) for size in arguments.default]
    for form, classes, rows in searches:
        command = [sys.executable, __file__, "--run-gradient", form]
        run = subprocess.run(
            [*command, str(classes), str(rows), str(arguments.seed)],
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(run.stderr)
        r = json.loads(run.stdout.splitlines()[-1])
        lines.append(
            f"| {form} | {classes} | {rows} "
            f"| {r['seconds']:.1f} | {r['evaluations']} "
            f"| {r['peak']:.2f} | {r['before']:.2f} | {r['unconverged']} "
            f"| {r['score_at_zero']:.4f} -> {r['score']:.4f} |"
        )
        print(lines[-1], flush=True)
    return lines


def cost_of(rows, classes, order, arguments):
    """Return the median µs a solve, compilation apart, of 20 candidates."""
    teacher = teachers(rows, classes, arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    count = int(np.clip(2e7 / (rows * classes), 2, 20))
    epsilons = generator.uniform(-1, 10, size=(count, 1, order))
    newton(teacher, epsilons)
    return 1e6 * np.median([newton(teacher, epsilons)[0] for _ in range(7)])


def plot(results, path, arguments):
    """Draw the cost of a solve against C, N and M."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in (OURS, PUBLISHED, FIXED, *JAX_RIVALS):
        points = {c: f[name] for c, f in results.items() if name in f}
        if points:
            axes[0].plot(
                list(points),
                [1e6 * f["seconds"] for f in points.values()],
                "o-" if name == OURS else "x:",
                linewidth=2 if name == OURS else 1,
                label=name,
            )
    axes[0].set(xscale="log", xlabel="classes C", title="N = 1000, M = 5")
    axes[0].set(ylabel="µs a solve")
    many = (100, 1000, 10000, 100000)
    for classes in (3, 100):
        rows = [n for n in many if n * classes <= 2_000_000]
        axes[1].plot(
            rows,
            [cost_of(n, classes, ORDER, arguments) for n in rows],
            "o-",
            label=f"newton, C = {classes}",
        )
        orders = (1, 2, 3, 5, 8, 12)
        axes[2].plot(
            orders,
            [cost_of(arguments.rows, classes, m, arguments) for m in orders],
            "o-",
            label=f"newton, C = {classes}",
        )
    axes[1].set(xscale="log", xlabel="rows N", title="M = 5")
    axes[2].set(xlabel="order M", title="N = 1000")
    for axis in axes:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def described():
    """Return a sentence on the machine, with the rivals that run here."""
    names = ["keras", keras.backend.backend(), "numpy", "scipy"]
    if keras.backend.backend() == "jax":
        names.append("optimistix")
    return machine(names, load_average("at the start"))


def main():
    """Run all parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=pathlib.Path)
    add("--classes", type=int, nargs="+", default=[2, 3, 10, 100, 1000])
    add("--rows", type=int, default=1000)
    add("--candidates", type=int, default=100)
    add("--few", type=int, default=10, help="candidates at C = 1000")
    add("--repeats", type=int, default=5)
    add("--seed", type=int, default=0)
    add("--budget", type=float, default=60.0, help="seconds of one fsolve run")
    add("--once", type=float, default=10.0, help="no repeat of longer runs")
    sizes = {
        "type": lambda text: tuple(map(int, text.split("x"))),
        "nargs": "*",
        "help": "CxN of these searches, as in 1000x5000",
    }
    add("--gradient", default=[(10, 1000), (100, 5000), (1000, 5000)], **sizes)
    sizes_of_default = [(3, 1000), (10, 1000), (100, 1000), (1000, 5000)]
    add("--default", default=sizes_of_default, **sizes)
    add("--run-gradient", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_gradient:
        gradient_search(*arguments.run_gradient)
        return
    head = HEADER.format(
        backend=keras.backend.backend(),
        order=ORDER,
        machine=described(),
        **vars(arguments),
    )
    results = {c: solvers_at(c, arguments) for c in arguments.classes}
    lines = solver_table(results)
    lines += convex_table(arguments)
    lines += end_to_end(results, arguments)
    lines += gradient_table(arguments)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        picture = arguments.output.with_suffix(".png")
        plot(results, picture, arguments)
        lines += ["", f"![Cost of a solve]({picture.name})"]
        arguments.output.write_text(head + "\n".join(lines) + "\n")
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main()
