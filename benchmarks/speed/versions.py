"""Two versions of the package: the solver's time, and what searches find.

    git worktree add /tmp/before 660a0d8
    KERAS_BACKEND=jax python benchmarks/speed/versions.py /tmp/before . \
        --data ../shared/data

Each version runs in processes of its own, by turns. Times are of the
processor, so that other jobs of the machine count little; of Algorithm 1 they
are by the clock, with all cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import numpy as np

CLASSES = (3, 10, 100, 1000)
SHARPENED = (1, 10, 20)  # the factors of the teachers' logits


def solve_times(repeats):
    """Yield `(C, kind of epsilon and call, processor seconds of a solve)`."""
    try:
        from keras_ptloss.proxy._proxy_teacher import solve_newton
    except ImportError:
        from keras_ptloss._proxy_teacher import solve_newton

    random = np.random.default_rng(0)
    for classes in CLASSES:
        teacher = random.dirichlet(np.full(classes, 0.3), size=1000)
        several = 30 if classes < 100 else 5
        for name, width in (("shared", 1), ("per class", classes)):
            epsilon = random.uniform(-0.2, 10.0, (several, width, 5))
            one = epsilon[0, 0] if width == 1 else epsilon[0]
            for call, given in (("several", epsilon), ("one", one)):
                solve_newton(teacher, given)
                count = several if call == "several" else 1
                for _ in range(repeats):
                    begin = time.process_time()
                    for _ in range(several // count):
                        solve_newton(teacher, given)
                    seconds = time.process_time() - begin
                    kind = f"{name}, {call} a call"
                    yield classes, kind, seconds / (several * len(teacher))


def search_times(repeats):
    """Yield `(C, "Algorithm 1", seconds of a later call)`, by the clock."""
    random = np.random.default_rng(0)
    for classes in (3, 100):
        teacher = random.dirichlet(np.full(classes, 0.3), size=1000)
        labels = random.integers(classes, size=1000)
        search = algorithm_1(0)
        search.search(teacher, labels)
        for _ in range(repeats):
            begin = time.perf_counter()
            search.search(teacher, labels)
            yield classes, "Algorithm 1", time.perf_counter() - begin


def algorithm_1(seed):
    """Return the paper's search, of either version."""
    import keras_ptloss

    try:
        method = keras_ptloss.search.RandomSearch(order=5)
    except AttributeError:
        return keras_ptloss.ProxyTeacherSearch(
            method="random", order=5, seed=seed
        )
    return keras_ptloss.ProxyTeacherSearch(method, seed=seed)


def times(repeats):
    """Yield all of them."""
    warnings.simplefilter("ignore")  # of labels that tell nothing
    yield from solve_times(repeats)
    yield from search_times(repeats)


def teachers(data):
    """Yield `(name, rows of the search, other rows, outputs, labels)`."""
    file = np.load(data / "cifar10" / "teachers_train.npz")
    labels = file["labels"]
    few, rest = np.split(
        np.random.default_rng(0).permutation(len(labels)), [1000]
    )
    for key in sorted(k for k in file.files if k.endswith("__probs"))[::3]:
        rows = np.maximum(file[key].astype("float64"), 1e-8)
        rows /= rows.sum(axis=1, keepdims=True)
        yield key.removesuffix("__probs"), few, rest, rows, labels


def found(data):
    """Yield `(teacher, factor, held-out NLL)` of searches by gradient."""
    import keras_ptloss

    for key, few, rest, rows, labels in teachers(data):
        logits = np.log(rows)
        for factor in SHARPENED:
            rows = np.exp(factor * (logits - logits.max(1, keepdims=True)))
            rows /= rows.sum(1, keepdims=True)
            try:
                method = keras_ptloss.search.GradientSearch(
                    order=5, per_class=True, penalty=0.01
                )
                search = keras_ptloss.ProxyTeacherSearch(method)
            except AttributeError:
                search = keras_ptloss.ProxyTeacherSearch(
                    method="gradient", order=5, per_class=True, penalty=0.01
                )
            result = search.search(rows[few], labels[few])
            q = result.proxy_teacher(rows[rest]).probabilities
            right = q[np.arange(len(rest)), labels[rest]]
            nll = -np.log(np.maximum(right, 1e-300)).mean()
            yield key, factor, float(nll)


def drawn(data):
    """Yield `(teacher, seed, epsilon)` of the studies' Algorithm 1."""
    for key, few, _, rows, labels in teachers(data):
        for seed in range(3):
            result = algorithm_1(seed).search(rows[few], labels[few])
            yield key, seed, np.ravel(result.epsilon).tolist()


# Of a checkout, in a process of its own.
JOBS = {"time": lambda data: times(3), "found": found, "drawn": drawn}


def child(checkout, job, data):
    """Run this file on a checkout; return what it printed."""
    run = subprocess.run(
        [sys.executable, __file__, "--job", job, "--data", str(data)],
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    """Compare, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--job", choices=JOBS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(list(JOBS[arguments.job](arguments.data))))
        return
    before, now = arguments.checkouts
    ratios = {}
    for _ in range(arguments.turns):
        both = [child(c, "time", arguments.data) for c in (before, now)]
        for old, new in zip(*both, strict=True):
            ratios.setdefault(tuple(old[:2]), []).append(new[2] / old[2])
    print("| C | epsilon | time, now / before [quartiles] |")
    print("|---|---|---|")
    for (classes, name), values in ratios.items():
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        print(f"| {classes} | {name} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    if arguments.data:
        print("\n| teacher | logits times | NLL before | NLL now |")
        print("|---|---|---|---|")
        both = [child(c, "found", arguments.data) for c in (before, now)]
        for old, new in zip(*both, strict=True):
            print(f"| {old[0]} | {old[1]} | {old[2]:.4f} | {new[2]:.4f} |")
        both = [child(c, "drawn", arguments.data) for c in (before, now)]
        same = [old == new for old, new in zip(*both, strict=True)]
        print(
            f"\nAlgorithm 1, {len(same)} searches: the same epsilon, to the "
            f"last digit, in {sum(same)}."
        )


if __name__ == "__main__":
    main()
