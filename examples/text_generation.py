"""Distil a language model from its teacher's 16 likeliest tokens.

    python examples/text_generation.py --seeds 1

trains a small GPT-2 and students of a quarter of its size on the documentation
that Python carries in its sources, with no download. From the teacher's 16
largest log-probabilities a token, which is what APIs give, come students with
and without the rest of the probability, and one of a PTLoss whose temperature
and epsilon were searched on held-out text. Beside them stand students of the
text alone and of the teacher's full distributions. Perplexity is on text that
neither teacher nor student has seen.

On a GPU, with any two KerasHub presets of one tokenizer:

    python examples/text_generation.py --teacher gpt2_medium_en \
        --student gpt2_base_en --data texts --sequence-length 512

where `texts` has `.txt` files, a document each. A preset is a teacher as it is;
`--teacher-epochs` trains it further. The output directory gets the stored
log-probabilities and a student, as a preset that `generate` can be called on.
"""

import argparse
import ast
import math
import pathlib
import pydoc_data.topics
import sysconfig
import tempfile
import warnings

import keras
import keras_hub
import numpy as np
import tokenizers

from keras_ptloss import Distiller, ProxyTeacherSearch, PTLoss
from keras_ptloss.losses import TopKPTLoss
from keras_ptloss.search import CalibrationSearch, GradientSearch, top_k_events
from keras_ptloss.soft_labels import TokenLabels, TokenLabelSpec

# What is built where no preset is given.
SHAPES = {
    "teacher": {"num_layers": 3, "num_heads": 4, "hidden_dim": 128},
    "student": {"num_layers": 2, "num_heads": 2, "hidden_dim": 64},
}
VOCABULARY = 1000
END = "<|endoftext|>"
K = 16
BATCH = 16
SEARCHED = 10_000  # positions that the search looks at
SHARES = {"teacher": 0.6, "student": 0.3, "search": 0.03, "test": 0.07}


def load_documents(data=None):
    """Load texts.

    Args:
        data: directory with `.txt` files; None takes the docstrings of
            Python's standard library, a document a module, and Python's
            reference as `help()` shows it.

    Returns:
        A list of strings.

    Raises:
        ValueError: if there are fewer than ten.
    """
    if data is not None:
        paths = sorted(pathlib.Path(data).glob("**/*.txt"))
        texts = [path.read_text(encoding="utf-8") for path in paths]
    else:
        texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.glob("**/*.py")):
            folders = path.relative_to(root).parts
            if not {"site-packages", "test", "tests"} & set(folders):
                texts.append(_docstrings(path))
    texts = [text for text in texts if text.strip()]
    if len(texts) < 10:
        raise ValueError(
            "`data` must be a directory with ten or more .txt files. Received: "
            f"{len(texts)} in {data}"
        )
    return texts


def _docstrings(path):
    """Return a module's docstrings of more than a line, in their order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sources that are read
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    return "\n\n".join(text for text in found if text and "\n" in text)


def split_documents(texts):
    """Share documents out, so that no part has what another has seen."""
    order = np.random.default_rng(0).permutation(len(texts))
    ends = np.cumsum([round(s * len(texts)) for s in SHARES.values()])[:-1]
    parts = np.split(order, ends)
    return {
        name: [texts[i] for i in part]
        for name, part in zip(SHARES, parts, strict=True)
    }


def make_preprocessor(preset, texts, sequence_length):
    """Return a preset's tokenizer, or byte-pair encoding learnt from texts."""
    if preset is not None:
        return keras_hub.models.CausalLMPreprocessor.from_preset(
            preset, sequence_length=sequence_length
        )
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(
        texts,
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = learner.save_model(folder)
        tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges)
    return keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )


def make_writer(role, preset, preprocessor):
    """Return a CausalLM: a preset, or a new one of the role's shape."""
    if preset is not None:
        return keras_hub.models.CausalLM.from_preset(
            preset, preprocessor=preprocessor
        )
    shape = SHAPES[role]
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        intermediate_dim=4 * shape["hidden_dim"],
        max_sequence_length=preprocessor.sequence_length,
        dropout=0.0,
        **shape,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def cut(texts, preprocessor):
    """Return the texts one after the other, cut into rows, and next tokens.

    Returns:
        What a model takes, token ids with a mask of ones, and labels `(N, T)`.
    """
    tokenizer, length = preprocessor.tokenizer, preprocessor.sequence_length
    ids = []
    for text in texts:
        ids += [*np.asarray(tokenizer(text)), tokenizer.end_token_id]
    rows = (len(ids) - 1) // length
    if not rows:
        raise ValueError(
            "`data` must have more tokens in each part than "
            f"--sequence-length. Received: {len(ids)} tokens in a part, "
            f"--sequence-length {length}"
        )
    ids = np.array(ids[: rows * length + 1], "int32")
    x = ids[:-1].reshape(rows, length)
    x = {"token_ids": x, "padding_mask": np.ones_like(x)}
    return x, ids[1:].reshape(rows, length)


def plain(writer):
    """Return a CausalLM as a plain model, which takes ids and not strings."""
    return keras.Model(writer.input, writer.output)


def train(model, x, y, *, loss, epochs, rate):
    """Train by Adam; the rate rises for a tenth of the steps, then falls."""
    steps = epochs * math.ceil(len(y) / BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=rate, warmup_steps=steps // 10 + 1
    )
    optimizer = keras.optimizers.Adam(schedule, global_clipnorm=1.0)
    model.compile(optimizer, loss=loss)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=2)


def perplexity(model, x, y):
    """Return `exp` of the mean cross-entropy a token."""
    model.compile(loss=cross_entropy())
    return math.exp(model.evaluate(x, y, batch_size=BATCH, verbose=0))


def cross_entropy():
    """Return the loss of next tokens."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def store_top_k(teacher, x, path, teacher_name):
    """Store the teacher's K likeliest tokens at each position, once.

    Of the teacher nothing else is kept; what is there already is read.

    Returns:
        A loss's `y_true`, `(N, T, K + 1, 2)`, the last entry being the rest.
    """
    labels = TokenLabels.write(
        teacher,
        x,
        path,
        spec=TokenLabelSpec(K, from_logits=True, teacher_name=teacher_name),
        batch_size=BATCH,
        verbose=0,
    )
    (batch,) = labels.attach(x, batch_size=len(x["token_ids"]))
    return batch[1]


def search(y_true, labels):
    """Search what to correct of the teacher, on text that it has not seen.

    Returns:
        Losses by name: of a temperature alone, and with shared epsilon.
    """
    rows, events = (a[:SEARCHED] for a in top_k_events(y_true, labels))
    losses = {}
    for name, method in {
        "temperature": CalibrationSearch("temperature"),
        "PTLoss": GradientSearch(
            order=3, calibration="temperature", penalty=0.001
        ),
    }.items():
        result = ProxyTeacherSearch(method).search(rows, events)
        temperature = 1.0 / float(result.correction.scale)
        print(
            f"{name}: teacher_temperature {temperature:.3f}, epsilon "
            f"{np.round(result.epsilon, 3)}; NLL of {len(events):,} events "
            f"{result.score_at_zero:.4f} to {result.score:.4f}"
        )
        losses[name] = TopKPTLoss(
            result.epsilon, teacher_temperature=temperature, from_logits=True
        )
    return losses


def distil(arguments):
    """Run the whole example; return perplexities by method, `(seeds,)` each."""
    texts = split_documents(load_documents(arguments.data))
    preprocessor = make_preprocessor(
        arguments.teacher, texts["teacher"], arguments.sequence_length
    )
    parts = {name: cut(part, preprocessor) for name, part in texts.items()}
    print("Tokens:", {name: labels.size for name, (_, labels) in parts.items()})

    keras.utils.set_random_seed(0)
    teacher = plain(make_writer("teacher", arguments.teacher, preprocessor))
    if arguments.teacher_epochs:
        train(
            teacher,
            *parts["teacher"],
            loss=cross_entropy(),
            epochs=arguments.teacher_epochs,
            rate=arguments.rate,
        )
    results = {"the teacher": [perplexity(teacher, *parts["test"])]}

    x, next_tokens = parts["student"]
    name = f"{arguments.teacher}, {arguments.teacher_epochs} epochs"
    targets, for_search = (
        store_top_k(
            teacher, parts[p][0], arguments.output / f"{p}.tokens", name
        )
        for p in ("student", "search")
    )
    mass = np.exp(targets[..., :-1, 1]).sum(axis=-1).mean()
    print(f"The {K} likeliest tokens have {100 * mass:.1f} % on average")
    searched = search(for_search, parts["search"][1])
    losses = {
        "cross-entropy alone": cross_entropy(),
        "full KL": PTLoss(0.0, from_logits=True),
        f"top {K}, the rest an event": TopKPTLoss(0.0, from_logits=True),
        f"top {K}, no tail": TopKPTLoss(
            0.0, tail="renormalize", from_logits=True
        ),
        f"top {K}, temperature searched": searched["temperature"],
        f"top {K}, PTLoss searched": searched["PTLoss"],
    }
    for seed in range(arguments.seeds):
        for name, loss in losses.items():
            keras.utils.set_random_seed(seed)
            writer = make_writer("student", arguments.student, preprocessor)
            model = student = plain(writer)
            if name == "full KL":
                model = Distiller(student, teacher)
            of_teacher = isinstance(loss, TopKPTLoss)
            train(
                model,
                x,
                targets if of_teacher else next_tokens,
                loss=loss,
                epochs=arguments.epochs,
                rate=arguments.rate,
            )
            score = perplexity(student, *parts["test"])
            results.setdefault(name, []).append(score)
            print(f"seed {seed}, {name}: {score:.2f}", flush=True)
    sizes = [model.count_params() for model in (teacher, student)]
    writer.save_to_preset(arguments.output / "student")
    writer.compile(sampler="greedy")
    prompt = "Return the"
    length = min(30, arguments.sequence_length)
    print(f"The last student: {writer.generate(prompt, max_length=length)}")
    return results, sizes


def table(results, sizes):
    """Return perplexities as Markdown: mean, and deviation over the seeds."""
    seeds = max(map(len, results.values()))
    lines = [
        f"{keras.config.backend()}, {seeds} seeds; teacher of {sizes[0]:,} "
        f"weights, students of {sizes[1]:,}",
        "",
        "| | perplexity, held-out text | each seed |",
        "|---|---|---|",
    ]
    for name, values in results.items():
        cell = f"{np.mean(values):.2f}"
        if len(values) > 1:
            cell += f" ± {np.std(values, ddof=1):.2f}"
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {cell} | {each} |")
    return "\n".join(lines)


def main(arguments=None):
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="KerasHub preset or directory")
    parser.add_argument("--student", help="the same, of the same tokenizer")
    parser.add_argument(
        "--data", type=pathlib.Path, help="folder of .txt files"
    )
    parser.add_argument("--teacher-epochs", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, help="of learning")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("generation-output")
    )
    parser.add_argument("--table", type=pathlib.Path, help="file to append to")
    arguments = parser.parse_args(arguments)
    if (arguments.teacher is None) != (arguments.student is None):
        parser.error("--teacher and --student must be given both, or neither")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data must be a directory. Received: {arguments.data}")
    if arguments.teacher_epochs is None:
        arguments.teacher_epochs = 0 if arguments.teacher else 3
    if arguments.rate is None:
        arguments.rate = 5e-5 if arguments.teacher else 3e-3
    for name in ("epochs", "seeds", "sequence_length"):
        value = getattr(arguments, name)
        if value < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1. Received: {value}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = table(*distil(arguments))
    print(f"\n{report}\n\nA student, and what was stored: {arguments.output}")
    if arguments.table:
        with open(arguments.table, "a", encoding="utf-8") as file:
            file.write(f"\n{report}\n")


if __name__ == "__main__":
    main()
