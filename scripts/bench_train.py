"""Training speed against sentence-transformers, and of many experts in one run: the same pairs, interleaved.

  python -m scripts.bench_train --data DATA [--steps N] [--repeats R] [--out DIR]

DATA is a folder of BEIR folders. Three comparisons: an expert of both towers by pairs a second against LoRA through peft and
against fine-tuning; an expert of queries by the seconds that it takes to a dev nDCG@10 that fine-tuning reaches too; all domains'
experts in one run against a run for each. It needs an environment with moeret, sentence-transformers and peft; the peers use
bfloat16 too where the processor or an accelerator multiplies it. Embedding DATA comes first and is kept in DIR. More than an hour
on two slow cores. Writes a section of BENCHMARKS.md and docs/train.svg.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import moeret
from moeret.config import DEFAULT_BASE, TrainConfig
from moeret.data.plan import BatchPlan
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.mesh import make_mesh
from moeret.models.model import VECTORS
from moeret.models.pretrained import find_base
from moeret.training.batches import Batches
from moeret.training.learn import fit_experts
from moeret.training.prepare import Prepared, prepare, read_domains
from moeret.training.routing import dev_ndcg
from moeret.training.step import TrainState, add_batch, learning_rates, make_optimizer, update, zero_totals
from moeret.training.towers import QueryTower
from scripts.benchmarks import FILE, fast_precision, interleaved_seconds, markdown_table, write_section

OURS, FULL, LORA = "moeret", "sentence-transformers, fine-tuning", "sentence-transformers, LoRA"
PAIRS_OF = ("conala", "obliqa", "esco-jobs")
"""Domains whose experts are compared with the peer's: short texts, long ones, titles."""
BOUNDS = {"pairs": 1.5, "time": 8.0, "together": 1.1}
PEER_RATE = 5e-5
"""Of the peer's fine-tuning: its trainer's default."""
LOOK_EVERY, LOOKS = 10, 12
"""Steps of the peer between two looks at dev, and how many looks it gets. We look as often."""

Pairs = list[tuple[list[str], list[str]]]
"""Each step's queries and their documents."""


def with_one_positive(data: Prepared) -> Prepared:
    """Every query with its first positive alone, so that both systems read the same pairs."""
    sets = [dataclasses.replace(own, positives=[rows[:1] for rows in own.positives]) for own in data.sets]
    return dataclasses.replace(data, sets=sets)


def pairs_of(data: Prepared, config: TrainConfig) -> Pairs:
    """The pairs of the only domain's steps, as `Batches` plans them."""
    [own], [domain] = data.sets, data.domains
    lengths = [np.array([len(ids) for ids in own.queries])]
    plan = BatchPlan.make([own.name], lengths, config.batch_size, config.seed, config.steps)
    queries = [*domain.splits["train"].queries.values()]
    batches = [plan.batch(step, 0).rows for step in range(config.steps)]
    random = np.random.default_rng(0)

    def document(query: int) -> str:
        return domain.corpus[int(random.choice(own.positives[query]))].contents

    return [([queries[row] for row in rows], [document(row) for row in rows]) for rows in batches]


def our_steps(data: Prepared, embedder: Embedder, config: TrainConfig) -> Callable[[], object]:
    """Trains an expert of the only domain for the steps of `config`, on and on."""
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, config.expert, [jax.random.key(0)])
    texts = [document.contents for document in data.domains[0].corpus]
    layers = experts.trunk_layers(bank, base.config)
    batches = Batches(
        base.config, layers, base.params, data.pool, base.tokenizer(texts), data.sets, config, make_mesh()
    )
    optimizer = make_optimizer(config)
    state = jax.device_put(TrainState(bank, optimizer.init(bank)))

    def run() -> None:
        nonlocal state
        for step in range(config.steps):
            totals = zero_totals(state.bank)
            for expert, batch in batches.step(step, np.ones(1, bool)):
                totals = add_batch(batches.static, batches.frozen, state.bank, totals, expert, batch)
            rates = learning_rates(config, batches.limits, step)
            state = update(batches.mesh, optimizer, state, totals.gradients, jax.numpy.asarray(rates))
        jax.block_until_ready(state)

    return run


class Peer:
    """sentence-transformers in training: the loss it recommends for pairs, its scale the inverse of our temperature."""

    def __init__(self, config: TrainConfig, rate: float, *, lora: bool, bfloat16: bool):
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        self.device, self._wait = "cuda" if torch.cuda.is_available() else "cpu", torch.cuda.synchronize
        self.model = SentenceTransformer(str(find_base(DEFAULT_BASE)), device=self.device)
        if lora:
            self.model.add_adapter(_lora(config, self.model[0].auto_model.config.num_hidden_layers))
        self.model.train()
        self._loss = MultipleNegativesRankingLoss(self.model, scale=1 / config.temperature)
        trained = [own for own in self.model.parameters() if own.requires_grad]
        self.trained = sum(own.numel() for own in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=config.weight_decay)
        self._cast = torch.autocast(self.device, torch.bfloat16, enabled=bfloat16)
        self._warm, self._rate, self._steps = max(1, round(config.warmup * LOOK_EVERY * LOOKS)), rate, 0

    def step(self, queries: Sequence[str], documents: Sequence[str]) -> None:
        """One step on as many pairs."""
        self._steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1, self._steps / self._warm)
        features = [
            {
                name: own.to(self.device)
                for name, own in self.model.preprocess(list(texts)).items()
                if hasattr(own, "to")
            }
            for texts in (queries, documents)
        ]
        self._optimizer.zero_grad()
        with self._cast:
            loss = self._loss(features, None)
        loss.backward()
        self._optimizer.step()
        if self.device == "cuda":
            self._wait()

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Unit vectors."""
        return self.model.encode(list(texts), normalize_embeddings=True)


def _lora(config: TrainConfig, layers: int) -> Any:
    """The shape of our experts."""
    from peft import LoraConfig, TaskType

    changed = "|".join(str(layer) for layer in range(layers - config.expert.layers, layers))
    parts = r"attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense"
    return LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=config.expert.rank,
        lora_alpha=config.expert.rank,
        lora_dropout=0.0,
        target_modules=rf".*layer\.({changed})\.({parts})",
    )


def peers_of(config: TrainConfig, *, lora: bool) -> Iterator[tuple[str, Peer]]:
    """The peer in each precision that the machine multiplies."""
    for precision in dict.fromkeys(("float32", fast_precision())):
        rate = config.learning_rate if lora else PEER_RATE
        peer = Peer(config, rate, lora=lora, bfloat16=precision == "bfloat16")
        yield f"{LORA if lora else FULL}, {precision}", peer


def pairs_a_second(data: Prepared, embedder: Embedder, steps: int, repeats: int) -> dict[str, float]:
    """Pairs a second of each system, both towers, in as many steps on the same pairs."""
    data = with_one_positive(data)
    config = TrainConfig(tower="both", steps=steps, epochs=1000.0, hard_negatives=0)
    pairs = pairs_of(data, config)
    runs: dict[str, Callable[[], object]] = {}
    for lora in (False, True):
        for name, peer in peers_of(config, lora=lora):
            runs[name] = lambda own=peer: [own.step(*batch) for batch in pairs]
    for precision in dict.fromkeys(("float32", fast_precision())):
        own = dataclasses.replace(config, precision=precision)
        runs[f"{OURS}, {precision}"] = our_steps(data, embedder.in_precision(precision), own)
    seconds = interleaved_seconds(runs, repeats)
    return {name: steps * config.batch_size / own for name, own in seconds.items()}


@dataclasses.dataclass(slots=True)
class Curve:
    """Dev nDCG@10 against seconds of training, looks left out."""

    seconds: list[float]
    dev: list[float]

    def until(self, dev: float) -> float:
        """Seconds to the first look that finds as much."""
        return next(taken for taken, own in zip(self.seconds, self.dev, strict=True) if own >= dev)


class Timed(QueryTower):
    """Notes when dev is looked at, and stops the clock meanwhile."""

    def __init__(self, data: Prepared, embedder: Embedder):
        super().__init__(data, embedder)
        self.curve, self._started = Curve([], []), time.perf_counter()

    def values(self, bank: experts.Bank, active: np.ndarray, shared: experts.Shared | None = None) -> list[np.ndarray]:
        """As a QueryTower's."""
        taken = time.perf_counter() - self._started
        found = super().values(bank, active, shared)
        if active.any():
            self.curve.seconds.append(taken)
            self.curve.dev.append(float(found[0].mean()))
        self._started = time.perf_counter() - taken
        return found


def our_curve(data: Prepared, embedder: Embedder) -> Curve:
    """An expert of queries, as `moeret train` makes it but for the shared delta; compiled programs are on disk."""
    config = TrainConfig(precision=fast_precision(), evaluate_every=LOOK_EVERY, patience=1000)
    for _ in range(2):  # the first compiles what is not yet on disk
        tower = Timed(data, embedder)
        with tempfile.TemporaryDirectory() as work:
            fit_experts(data, embedder, tower, config, Path(work), show_progress_bar=False)
    return tower.curve


def peer_curve(data: Prepared, peer: Peer) -> Curve:
    """Fine-tuning both towers, documents embedded anew at every look."""
    config = TrainConfig(steps=LOOK_EVERY * LOOKS, epochs=1000.0)
    [own], [domain] = data.dev, data.domains
    documents = [document.contents for document in domain.corpus]
    curve, taken = Curve([], []), 0.0
    for step, batch in enumerate(pairs_of(data, config)):
        started = time.perf_counter()
        peer.step(*batch)
        taken += time.perf_counter() - started
        if (step + 1) % LOOK_EVERY == 0:
            dev = dev_ndcg(own, peer.encode(own.texts), peer.encode(documents)).mean()
            curve.seconds.append(taken)
            curve.dev.append(float(dev))
    return curve


def together_and_alone(
    read: Sequence[Any], embedder: Embedder, cache: Path, steps: int, repeats: int
) -> tuple[dict[int, float], float, float]:
    """Seconds of one run by its number of experts, of a run for each of all, and the largest difference of a dev score."""
    config = TrainConfig(precision=fast_precision(), steps=steps, epochs=1000.0, evaluate_every=steps)
    dev: dict[str, list[float]] = {"together": [], "alone": []}

    def fit(data: Prepared, kind: str | None = None) -> None:
        with tempfile.TemporaryDirectory() as work:
            tower = QueryTower(data, embedder)
            bank = fit_experts(data, embedder, tower, config, Path(work), show_progress_bar=False).bank
        if kind:
            every = np.ones(len(data.sets), bool)
            dev[kind] += [float(own.mean()) for own in tower.values(bank, every)]

    whole = prepare(read, embedder, config, cache, show_progress_bar=False)

    def some(chosen: slice) -> Prepared:
        parts = {name: getattr(whole, name)[chosen] for name in ("domains", "sets", "dev", "profiles")}
        return dataclasses.replace(whole, **parts)

    counts = sorted({1, *(count for count in (2, len(read) // 2) if 0 < count < len(read)), len(read)})
    runs: dict[str, Callable[[], object]] = {f"{count}": lambda own=count: fit(some(slice(own))) for count in counts}
    each = [some(slice(number, number + 1)) for number in range(len(read))]
    runs["alone"] = lambda: [fit(own) for own in each]
    seconds = interleaved_seconds(runs, repeats)
    fit(whole, "together")
    for own in each:
        fit(own, "alone")
    difference = float(np.abs(np.subtract(dev["together"], dev["alone"])).max())
    return {count: seconds[f"{count}"] for count in counts}, seconds["alone"], difference


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed at a time")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_train"), help="where vectors are kept")
    arguments = parser.parse_args()
    base = moeret.Model.load(DEFAULT_BASE).base
    embedder = Embedder(base, experts.base_alone(base.config, TrainConfig().expert))
    folders = {path.parents[1].name: path.parents[1] for path in sorted(arguments.data.glob("*/qrels/train.tsv"))}
    read, cache = read_domains(folders), arguments.out / VECTORS
    by_name = {domain.name: domain for domain in read}
    body: list[str] = []

    # ---- Both towers, pairs a second
    rates = {}
    for name in PAIRS_OF:
        data = prepare([by_name[name]], embedder, TrainConfig(), cache, show_progress_bar=False)
        rates[name] = pairs_a_second(data, embedder, arguments.steps, arguments.repeats)
        print(name, rates[name], flush=True)
    body += _rates(rates)

    # ---- Queries alone, time to equal dev
    curves = {}
    for name in PAIRS_OF:
        data = prepare([by_name[name]], embedder, TrainConfig(), cache, show_progress_bar=False)
        peers = {label: peer_curve(data, peer) for label, peer in peers_of(TrainConfig(), lora=False)}
        curves[name] = {OURS: our_curve(data, embedder), **peers}
        print(name, curves[name], flush=True)
    body += _times(curves)

    # ---- Many experts in one run
    counts, alone, difference = together_and_alone(read, embedder, cache, 2 * arguments.steps, arguments.repeats)
    body += _together(counts, alone, difference, 2 * arguments.steps)
    _plot(curves, counts)
    body.append("![Dev nDCG@10 against seconds; seconds against experts](docs/train.svg)")
    print("\n\n".join(body))
    extra = {name: version(name) for name in ("sentence-transformers", "transformers", "torch", "peft")}
    write_section("train", "Training", "\n\n".join(body), extra)


def _verdict(holds: bool, bound: str) -> str:
    return f"({'holds' if holds else '**fails**'}: {bound})"


def _rates(rates: dict[str, dict[str, float]]) -> list[str]:
    systems = [*next(iter(rates.values()))]
    rows = [[name, *(f"{own[name]:.1f}" for own in rates.values())] for name in systems]
    lines = []
    for domain, own in rates.items():
        ours = max(rate for name, rate in own.items() if name.startswith(OURS))
        lora = max(rate for name, rate in own.items() if name.startswith(LORA))
        fails = _verdict(ours / lora >= BOUNDS["pairs"], f"at least {BOUNDS['pairs']}")
        lines.append(f"- {domain}: {ours / lora:.2f} times the peer's LoRA at its fastest {fails}")
    head = (
        "Both towers, batches of 32 pairs out of one domain, pairs a second; the same pairs, and LoRA of the same rank, layers and "
        "matrices:"
    )
    return [head, markdown_table(["system", *rates], rows), "\n".join(lines)]


def _times(curves: dict[str, dict[str, Curve]]) -> list[str]:
    rows, lines = [], []
    for domain, own in curves.items():
        ours = own[OURS]
        target = min(max(ours.dev), max(max(curve.dev) for name, curve in own.items() if name != OURS))
        theirs = min(curve.until(target) for name, curve in own.items() if name != OURS and max(curve.dev) >= target)
        for name, curve in own.items():
            reached = f"{curve.until(target):.1f}" if max(curve.dev) >= target else "not reached"
            cells = (f"{100 * max(curve.dev):.1f}", f"{curve.seconds[-1]:.0f}", f"{100 * target:.1f}", reached)
            rows.append([f"{domain}: {name}", *cells])
        ratio = theirs / ours.until(target)
        fails = _verdict(ratio >= BOUNDS["time"], f"at least {BOUNDS['time']:.0f}")
        lines.append(f"- {domain}: fine-tuning takes {ratio:.1f} times our seconds to the same dev {fails}")
    head = (
        f"An expert of queries against fine-tuning (32 pairs a step, learning rate {PEER_RATE:g}, {LOOK_EVERY * LOOKS} steps), "
        f"dev nDCG@10 x 100 in the own corpus, looked at every {LOOK_EVERY} steps; seconds of training alone, and to the lower of "
        "both bests. Ours are without compiling, which is done once on a machine, and without embedding the corpus by the base, "
        "which the index needs anyway:"
    )
    columns = ["system", "best", "seconds in all", "both reach", "seconds to it"]
    return [head, markdown_table(columns, rows), "\n".join(lines)]


def _together(counts: dict[int, float], alone: float, difference: float, steps: int) -> list[str]:
    most = max(counts)
    columns = ["experts in one run", *(f"{count}" for count in counts), f"{most} runs of one"]
    rows = [["seconds", *(f"{own:.1f}" for own in counts.values()), f"{alone:.1f}"]]
    ratio = counts[most] / alone
    fails = _verdict(ratio <= BOUNDS["together"], f"at most {BOUNDS['together']}")
    return [
        f"Experts of queries, {steps} steps each, the same pool of documents, looks at dev and checkpoints included:",
        markdown_table(columns, rows),
        f"- One run takes {ratio:.2f} times the seconds of {most} runs {fails}; dev nDCG@10 x 100 differs by "
        f"{100 * difference:.2f} at most.",
    ]


def _plot(curves: dict[str, dict[str, Curve]], counts: dict[int, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "moeret"
    figure, panels = plt.subplots(1, 1 + len(curves), figsize=(3 * (1 + len(curves)), 3), layout="constrained")
    for axes, (domain, own) in zip(panels, curves.items(), strict=False):
        for name, curve in own.items():
            shown = [place for place, taken in enumerate(curve.seconds) if taken > 0]
            style = "-" if name == OURS else "--"
            axes.plot([curve.seconds[i] for i in shown], [100 * curve.dev[i] for i in shown], style, label=name)
        axes.set(xscale="log", xlabel="seconds of training", ylabel="dev nDCG@10 x 100", title=domain)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=3)
    panels[-1].plot([*counts], [*counts.values()], "o-")
    panels[-1].set(xlabel="experts in one run", ylabel="seconds", ylim=(0, None), title="one run")
    figure.savefig(FILE.parent / "docs" / "train.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
