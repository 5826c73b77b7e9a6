"""Making models: train experts and router from BEIR folders, add an expert to a model, remove one."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import DEFAULT_BASE, ExpertConfig, TrainConfig, differences, require, to_json
from moeret.data.beir import check_name
from moeret.errors import ConfigError
from moeret.lock import require_own, writing
from moeret.models import experts
from moeret.models.card import MADE
from moeret.models.embed import Embedder
from moeret.models.memory import Blend
from moeret.models.mesh import local_mesh
from moeret.models.model import KIND, VECTORS, WORK, Model, Profile, read_profile, read_routers, read_shared
from moeret.models.portable import adapter_digests, read_adapter
from moeret.models.pretrained import base_files, find_base, load_base
from moeret.models.router import Router
from moeret.processes import is_first, wait_for_all
from moeret.progress import announce
from moeret.training.blend import Blended, DevBlends
from moeret.training.hours import counted
from moeret.training.learn import Learned, LearnedShared, learn, learn_shared, outline
from moeret.training.prepare import Prepared, prepare, read_domains, source_digests
from moeret.training.routing import DevSearch, choose_document_router, choose_query_router
from moeret.training.strength import LABEL_FREE, OWN
from moeret.types import SHARED_EXPERT


def train(
    domains: Mapping[str, str | Path],
    out: str | Path,
    *,
    base: str = DEFAULT_BASE,
    config: TrainConfig | None = None,
    model_devices: int = 1,
    show_progress_bar: bool = False,
) -> Artifact:
    """Trains one expert per domain (name -> BEIR folder, in any order) and a router, and publishes the model at `out`.

    A run that was cut off goes on where it stopped when this is called again with the same arguments; a finished one is
    returned as it is. Only the train and dev splits are ever read. The processes of a distributed run (`jax.distributed`) train one
    model: call this in all of them, with the same arguments and an `out` that all see. So many `model_devices` hold a base
    together that does not fit one of them.

    Raises:
      DataError: a folder that cannot be trained from.
      ConfigError: `out` holds a model or an unfinished run made with other arguments, or the devices cannot split the base so.
      BaseEncoderError: the base cannot be found or loaded.
      BusyError: another process is training there.
    """
    config = config or TrainConfig()
    require(len(domains) > 0, "there is no domain to train on; give at least one NAME=BEIR_DIR")
    for name in domains:
        check_name(name)
    # One order, whatever order they are given in: checkpoints know experts by their places.
    domains, out = {name: Path(domains[name]) for name in sorted(domains)}, Path(out)
    read = read_domains(domains)
    encoder = load_base(base, find_base(base))
    layers = encoder.config.layers
    require(
        config.expert.layers <= layers, f"the base has {layers} layers; experts cannot change {config.expert.layers}"
    )
    request = {
        **to_json(config),
        "base": encoder.fingerprint,
        **{f"domain {name}": source_digests(path) for name, path in domains.items()},
    }
    if is_first():
        require_own(out, artifact.MANIFEST, WORK, MADE)
    with writing(out) if is_first() else nullcontext(), counted(out, "train") as start:
        if artifact.exists(out):
            finished = artifact.read(out, KIND)
            _require_same(
                finished.meta["request"], request, f"{out} is a finished model made with other arguments", out
            )
            names = [entry["name"] for entry in finished.meta["experts"]]
            require(
                sorted(names) == [*domains],
                f"{out} was trained with these arguments, but its experts have changed since (now {', '.join(names)}); "
                "use `moeret experts`, or choose another directory",
            )
            return finished
        start(request)
        announce(outline(read, config), shown=show_progress_bar)
        nothing = experts.base_alone(encoder.config, config.expert)
        embedder = Embedder(encoder, nothing, mesh=local_mesh(model_devices))
        work = _open_work(out / WORK, request)
        data = prepare(read, embedder, config, work / VECTORS, show_progress_bar=show_progress_bar)
        embedder, shared = embedder.in_precision(config.precision), None
        blends = DevBlends(data) if config.tower == "query" else None
        if config.expert.shared_rank and blends:
            shared = learn_shared(data, embedder, config, work / SHARED_EXPERT, show_progress_bar=show_progress_bar)
        delta = shared and shared.delta
        trained = learn(data, embedder, delta, blends, config, work, show_progress_bar=show_progress_bar)
        if not is_first():
            wait_for_all("published")
            return artifact.read(out, KIND)
        search = None
        if config.tower == "query":
            full = embedder.with_bank(experts.with_base(trained.bank), trained.shared)
            search = DevSearch(data.dev, full, data.pool)
        announce("Choosing the router, on dev", shown=show_progress_bar)
        query_router, report = choose_query_router(
            [profile.train_queries for profile in data.profiles],
            [profile.dev_queries for profile in data.profiles],
            search,
        )
        draft = Draft(out, KIND)
        for name, path in base_files(encoder.folder).items():
            draft.copy(f"base/{name}", path)
        requests = {name: {**to_json(config), (key := f"domain {name}"): request[key]} for name in domains}
        of_base = blends.of_one([own.vectors for own in data.dev]) if blends else Blend()
        entries = _write_experts(draft, data, trained, of_base, requests, added=False)
        meta = {
            "base": {
                # A folder's place is its maker's business: models are given to others.
                "name": Path(base).resolve().name if Path(base).is_dir() else base,
                "fingerprint": encoder.fingerprint,
                "calibration": trained.calibration[0],
                "blend": of_base._asdict(),
            },
            "tower": config.tower,
            "expert": to_json(config.expert),
            "shared": shared and _write_shared(draft, shared, blends.of_one(shared.dev_vectors)),
            "experts": entries,
            "router": _write_routers(draft, query_router, _document_router(data.profiles), report),
            "request": request,
        }
        published = draft.publish(meta)
        wait_for_all("published")
        return published


def add_expert(
    model: str | Path,
    name: str,
    domain: str | Path,
    *,
    config: TrainConfig | None = None,
    label_free: bool = False,
    peft: str | Path | None = None,
    show_progress_bar: bool = False,
) -> Artifact:
    """Trains one more expert for a published model and refits its router; no other expert's file changes.

    The other domains take part through their profiles: their documents as negatives, their queries for the router. With
    `label_free` only the folder's corpus is read, queries are made from its documents' titles and texts, the expert has a
    fixed strength (0 where it gains nothing on them), and words count as much as for the base. The folder of a LoRA adapter for
    the model's base, as PEFT saves it, is the expert instead of training steps where it is given as `peft`: all else, how much of
    it is used too, is chosen as for an expert that was trained.
    `config`'s tower and expert shape are the model's. Continues a run that was cut off, as `train` does.

    Raises:
      ConfigError: the model has an expert of that name already, made from other data or settings; or the adapter is none, of
        another base, or larger than the model's experts.
      DataError, BusyError: as for `train`.
    """
    check_name(name)
    model, domain, peft = Path(model), Path(domain), None if peft is None else Path(peft)
    require(
        not (peft and label_free),
        "how much of an adapter to use is told by judged queries: label_free does not go with peft",
    )
    artifact.read(model, KIND)  # nothing is locked or made where there is no model
    with writing(model), counted(model, f"add {name}") as start:
        loaded = Model.load(model)
        published = loaded.published
        shape = {key: tuple(v) if isinstance(v, list) else v for key, v in published.meta["expert"].items()}
        own = TrainConfig(tower=published.meta["tower"], expert=ExpertConfig(**shape))
        config = config or own
        for field, default in (("tower", TrainConfig().tower), ("expert", ExpertConfig())):
            asked, has = getattr(config, field), getattr(own, field)
            require(asked in (default, has), f"every expert of {model} has {field} {has}; it cannot be {asked}")
        config = dataclasses.replace(config, tower=own.tower, expert=own.expert)
        delta = peft and read_adapter(peft, loaded.base, config.expert)
        read = read_domains({name: domain}, label_free=label_free)
        request = {**to_json(config), f"domain {name}": source_digests(domain, label_free=label_free)}
        request |= {"adapter": adapter_digests(peft)} if peft else {}
        if name in loaded.experts:
            entry = published.meta["experts"][loaded.experts.index(name)]
            require(
                entry["request"] == request,
                f"{model} already has an expert {name}, made from other data or settings; remove it first",
            )
            return published
        start(request)
        # Its negatives are the other experts' documents: another set of experts is another run.
        work = _open_work(model / WORK / f"add-{name}", {**request, "model": published.fingerprint})
        profiles = [read_profile(published, entry["profile"]) for entry in published.meta["experts"]]
        embedder = Embedder(loaded.base, experts.base_alone(loaded.base.config, config.expert))
        data = prepare(
            read,
            embedder,
            config,
            model / WORK / VECTORS,
            [profile.documents for profile in profiles],
            show_progress_bar=show_progress_bar,
        )
        # Made-up queries share their words with documents as nobody's do, and other domains' queries are not like them: such a
        # dev says nothing of a blend or of the shared delta.
        shared = read_shared(published).delta if published.meta["shared"] and not label_free else None
        embedder = embedder.in_precision(config.precision)
        blends = DevBlends(data) if config.tower == "query" and not label_free else None
        trained = learn(
            data,
            embedder,
            shared,
            blends,
            config,
            work,
            given=delta and experts.stack([delta]),
            own_strengths=LABEL_FREE if label_free else OWN,
            show_progress_bar=show_progress_bar,
        )
        draft = Draft(model, KIND)
        of_base = Blend(**published.meta["base"]["blend"])
        entries = [
            *published.meta["experts"],
            *_write_experts(draft, data, trained, of_base, {name: request}, added=True),
        ]
        finished = _publish_next(draft, published, entries, [*profiles, *data.profiles])
        shutil.rmtree(work)
        return finished


def remove_expert(model: str | Path, name: str) -> Artifact:
    """Takes an expert out of a published model and refits its router; no other expert's file changes.

    Raises:
      ConfigError: there is no such expert, or it is the last one.
    """
    model = Path(model)
    artifact.read(model, KIND)  # nothing is locked or made where there is no model
    with writing(model):
        published = artifact.read(model, KIND)
        entries = published.meta["experts"]
        names = [entry["name"] for entry in entries]
        require(name in names, f"there is no expert {name!r} in {model}; it has {', '.join(names)}")
        require(len(names) > 1, f"{name} is the only expert of {model}; a model needs at least one")
        kept = [entry for entry in entries if entry["name"] != name]
        profiles = [read_profile(published, entry["profile"]) for entry in kept]
        return _publish_next(Draft(model, KIND), published, kept, profiles)


def _publish_next(
    draft: Draft, published: Artifact, entries: list[dict[str, Any]], profiles: Sequence[Profile]
) -> Artifact:
    """The next version of a model with these experts, and a refitted router with the rules of the one before."""
    before = read_routers(published)["query"]
    kept = {entry[key] for entry in entries for key in ("file", "profile", "memory")}
    if published.meta["shared"]:
        kept.add(published.meta["shared"]["file"])
    for name in published.files:
        if name.startswith("base/") or name in kept:
            draft.keep(published, name)
    query_router, report = choose_query_router(
        [profile.train_queries for profile in profiles],
        [profile.dev_queries for profile in profiles],
        yields=_yields(entries),
    )
    query_router = dataclasses.replace(query_router, minimum=before.minimum)
    router = _write_routers(draft, query_router, _document_router(profiles), report)
    return draft.publish({**published.meta, "experts": entries, "router": router})


def _yields(entries: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """For each expert that was added those before it that have judged queries, and keep them.

    Made-up queries are nobody's.
    """
    judged = [
        number for number, own in enumerate(entries) if "queries.jsonl" in own["request"][f"domain {own['name']}"]
    ]
    return {number: [other for other in judged if other < number] for number, own in enumerate(entries) if own["added"]}


def _open_work(work: Path, request: dict[str, Any]) -> Path:
    """The folder of a run's checkpoints, which belongs to one request for good."""
    file = work / "request.json"
    if file.is_file():
        _require_same(
            json.loads(file.read_text()), request, f"{work} holds an unfinished run with other arguments", work
        )
    elif is_first():
        work.mkdir(parents=True, exist_ok=True)
        artifact.write_atomically(file, json.dumps(request, indent=1).encode())
    return work


def _require_same(old: dict[str, Any], new: dict[str, Any], what: str, folder: Path) -> None:
    if old != new:
        raise ConfigError(
            f"{what} ({differences(old, new)}); repeat them, choose another directory, or delete {folder} to start over"
        )


def _write_shared(draft: Draft, shared: LearnedShared, blend: Blend) -> dict[str, Any]:
    tensors = experts.flatten(shared.delta)
    return {
        "file": draft.add("experts/_shared.safetensors", lambda path: save_file(tensors, path)),
        "step": shared.step,
        "strength": shared.strength,
        "blend": blend._asdict(),
        "base_dev_ndcg": round(shared.base_dev, 5),
        "dev_ndcg": round(shared.dev, 5),
    }


def _write_experts(
    draft: Draft,
    data: Prepared,
    trained: Learned,
    of_base: Blend,
    requests: dict[str, dict[str, Any]],
    *,
    added: bool,
) -> list[dict[str, Any]]:
    """The experts' files, and their entries; `added` to a model that had experts before."""
    entries = []
    for number, own in enumerate(data.domains):
        deltas = experts.flatten(experts.take(trained.bank, number))
        sample = data.profiles[number]
        if trained.dev_vectors:
            sample = dataclasses.replace(sample, dev_vectors=trained.dev_vectors[number])
        profile = {
            field.name: np.ascontiguousarray(getattr(sample, field.name)) for field in dataclasses.fields(Profile)
        }
        entries.append(
            {
                "name": own.name,
                "file": draft.add(f"experts/{own.name}.safetensors", lambda path, t=deltas: save_file(t, path)),
                "profile": draft.add(f"profiles/{own.name}.safetensors", lambda path, t=profile: save_file(t, path)),
                "documents": len(own.corpus),
                "train_queries": len(own.splits["train"].queries),
                "base_dev_ndcg": _groups(trained.base_dev[number]),
                "dev_ndcg": _groups(trained.dev[number]),
                "step": int(trained.steps[number]),
                "strength": float(trained.strengths.own[number]),
                "shared_strength": float(trained.strengths.shared[number]),
                "calibration": trained.calibration[number + 1],
                **_write_blend(draft, own.name, trained.blended and trained.blended[number], of_base),
                "added": added,
                "request": requests[own.name],
            }
        )
    return entries


def _write_blend(draft: Draft, name: str, blended: Blended | None, of_base: Blend) -> dict[str, Any]:
    """What counts beside an expert's cosine, and its dev nDCG@10 in its own index by the cosine alone and with that.

    As for the base where nothing was chosen.
    """
    if blended is None:
        return {"blend": of_base._asdict(), "own_index_dev_ndcg": None, "memory": None}
    file = None
    if blended.memory:
        tensors = {field: np.ascontiguousarray(own) for field, own in blended.memory._asdict().items()}
        file = draft.add(f"memories/{name}.safetensors", lambda path: save_file(tensors, path))
    dev = {"cosine": round(blended.cosine_dev, 5), "blend": round(blended.dev, 5)}
    return {"blend": blended.blend._asdict(), "own_index_dev_ndcg": dev, "memory": file}


def _groups(scores: Float[np.ndarray, "3"]) -> dict[str, float | None]:
    """nDCG@10 over all, seen and unseen dev queries; None where there are too few."""
    return {
        group: None if np.isnan(score) else round(float(score), 5)
        for group, score in zip(("all", "seen", "unseen"), scores, strict=True)
    }


def _document_router(profiles: Sequence[Profile]) -> Router:
    """Fitted on nine documents in ten of each profile, chosen and calibrated on the tenth."""
    held = [np.arange(len(profile.documents)) % 10 == 9 for profile in profiles]
    held = [mask if mask.any() else ~mask for mask in held]
    train = [p.documents[~mask] if (~mask).any() else p.documents for p, mask in zip(profiles, held, strict=True)]
    return choose_document_router(train, [p.documents[mask] for p, mask in zip(profiles, held, strict=True)])


def _write_routers(draft: Draft, query: Router, document: Router, report: dict[str, Any]) -> dict[str, Any]:
    tensors, rules = {}, {}
    for side, router in (("query", query), ("document", document)):
        own = {name: getattr(router, name) for name in ("weights", "bias")}
        own |= {f"familiarity.{name}": getattr(router.familiarity, name) for name in ("center", "spread", "known")}
        tensors |= {f"{side}.{name}": np.ascontiguousarray(tensor) for name, tensor in own.items()}
        rules[side] = {name: getattr(router, name) for name in ("kind", "reads", "slots", "minimum")}
        rules[side]["familiarity"] = router.familiarity.limit
    file = draft.add("router.safetensors", lambda path: save_file(tensors, path))
    return {"file": file, **rules, "report": report}
