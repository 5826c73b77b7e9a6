"""A PEFT adapter that comes in embeds as it does elsewhere, whole or not at all."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import LAYERS, QUERIES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import moeret
from moeret.cli import main
from moeret.config import MATRICES
from moeret.models import experts
from moeret.models.encoder import matrix_shapes
from moeret.models.model import read_expert, read_shared
from moeret.models.portable import export_expert, read_adapter
from moeret.models.pretrained import load_base, matrix_name
from moeret.training.strength import OWN, SHARED

WHOLE = moeret.ExpertConfig(rank=16, layers=LAYERS, shared_rank=0)


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base("someone/tiny", base_folder)


def write_adapter(folder, factors, start="base_model.model.", **changes):
    """An adapter as PEFT saves one, of {(layer, matrix): (A, B)}."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{start}{matrix_name(*place)}.lora_{side}.weight": np.ascontiguousarray(factor, np.float32)
        for place, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["query"]} | changes
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_factors(base, places, rank=4, seed=0):
    random, shapes = np.random.default_rng(seed), matrix_shapes(base.config)
    return {
        (layer, matrix): (random.normal(size=(rank, shapes[matrix][0])), random.normal(size=(shapes[matrix][1], rank)))
        for layer, matrix in places
    }


def embeddings(model, delta):
    """The queries as one delta on the model's base alone embeds them."""
    alone = model.embedder.with_bank(experts.with_base(experts.stack([delta]))).alone(1)
    return alone.base(model.with_prompt(QUERIES, "query"))


@pytest.mark.parametrize(("expert", "rank", "layers"), [("metal", 12, 2), ("fruit", 16, 3), ("shared", 12, 3)])
def test_an_expert_that_went_out_comes_in_as_it_was(model_folder, tmp_path, expert, rank, layers):
    model = moeret.Model.load(model_folder)
    out = export_expert(model, expert, tmp_path / "adapter", "peft")
    delta = read_adapter(out, model.base, moeret.ExpertConfig(rank=rank, layers=layers))
    np.testing.assert_allclose(embeddings(model, delta), model.encode_query(QUERIES, expert=expert), atol=1e-6)


places = st.sets(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(MATRICES)), min_size=1)


@settings(deadline=None, max_examples=40)
@given(places=places, data=st.data(), rslora=st.booleans())
def test_a_delta_is_what_peft_adds_to_a_matrix(base, tmp_path_factory, places, data, rslora):
    ranks, alphas = ({own: data.draw(st.integers(1, 16)) for own in sorted(places)} for _ in range(2))
    factors = {own: random_factors(base, [own], rank)[own] for own, rank in ranks.items()}
    adapter = write_adapter(
        tmp_path_factory.mktemp("adapter"),
        factors,
        data.draw(st.sampled_from(["base_model.model.", "base_model.model.bert.", "base_model.model.0.auto_model."])),
        rank_pattern={matrix_name(*own): rank for own, rank in ranks.items()},
        alpha_pattern={matrix_name(*own).replace(".", r"\."): alpha for own, alpha in alphas.items()},
        use_rslora=rslora,
    )
    delta = read_adapter(adapter, base, WHOLE)
    for layer in range(LAYERS):
        for matrix in MATRICES:
            own, added = (layer, matrix), delta[experts.layer_name(layer)][matrix]
            wanted = np.zeros((added["a"].shape[0], added["b"].shape[1]))
            if own in places:
                scale = alphas[own] / (np.sqrt(ranks[own]) if rslora else ranks[own])
                wanted = scale * (factors[own][1] @ factors[own][0]).T
            np.testing.assert_allclose(added["a"] @ added["b"], wanted, rtol=1e-4, atol=1e-4)


def test_the_pooler_which_no_embedding_reads_is_passed_over(base, tmp_path):
    adapter = write_adapter(tmp_path, random_factors(base, [(2, "key")]))
    before = read_adapter(adapter, base, WHOLE)
    pooler = {f"base_model.model.pooler.dense.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
    save_file(load_file(adapter / "adapter_model.safetensors") | pooler, adapter / "adapter_model.safetensors")
    after = read_adapter(adapter, base, WHOLE)
    assert all(np.array_equal(own, experts.flatten(after)[name]) for name, own in experts.flatten(before).items())


@pytest.mark.parametrize(("changes", "told"), [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"), ({"use_dora": True}, "use_dora True is not supported"),
    ({"bias": "lora_only"}, "bias 'lora_only'"), ({"modules_to_save": ["classifier"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"of_tomorrow": 3}, "of_tomorrow 3 is not supported"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"), ({"r": 8}, "rank 8 by this file and 4"),
    ({"r": None}, "r is None"), ({"lora_alpha": "8"}, "lora_alpha is '8'"), ({"alpha_pattern": {"(": 3}}, "not to be told"),
    ({"rank_pattern": {"query": 2}}, "rank 2 by this file"), ({"rank_pattern": [1]}, "no JSON object"),
    ({"base_model_name_or_path": "else/bigger"}, "adapter is of else/bigger, the model's base is someone/tiny"),
])  # fmt: skip
def test_what_is_more_than_factors_is_refused(base, tmp_path, changes, told):
    adapter = write_adapter(tmp_path, random_factors(base, [(2, "query")]), **changes)
    with pytest.raises(moeret.ConfigError, match=told.replace("(", r"\(")):
        read_adapter(adapter, base, WHOLE)


def test_the_same_base_of_other_hands_is_taken(base, tmp_path):
    factors = random_factors(base, [(2, "query")])
    for name in ("other/Tiny", "/elsewhere/a/folder", None):
        read_adapter(write_adapter(tmp_path, factors, base_model_name_or_path=name), base, WHOLE)


def with_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


NAME = "base_model.model.encoder.layer.2.attention.self.query.lora_"


@pytest.mark.parametrize(("change", "told"), [
    (lambda own: own | {NAME + "magnitude_vector": np.ones(3)}, "lora_magnitude_vector' is no LoRA factor"),
    (lambda own: own | {"base_model.model.embeddings.word_embeddings.lora_embedding_A": np.ones(3)}, "is no LoRA factor"),
    (lambda own: own | {NAME.replace("encoder", "text_encoder") + "A.weight": np.ones((4, 16))}, "text_.* is no LoRA factor"),
    (lambda own: own | {NAME.replace("layer.2", "layer.7") + "A.weight": np.ones((4, 16))}, "layer.7.* is no LoRA factor"),
    (lambda own: own | {NAME.replace(".model.", ".model.b.", 1) + "A.weight": np.ones((4, 16))}, "two adapters"),
    (lambda own: {NAME + "A.weight": own[NAME + "A.weight"]}, "only one of its two"),
    (lambda own: own | {NAME + "A.weight": np.ones((4, 24), np.float32)}, "the adapter is of another base"),
    (lambda own: own | {NAME + "B.weight": np.full((16, 4), np.nan, np.float32)}, "not finite"),
    (lambda own: {name: np.full_like(own[name], 1e30) for name in own}, "too large"),
    (lambda own: {name: own[name].astype(np.float64) * 1e300 for name in own}, "not finite"),
    (lambda own: {name: own[name].astype(np.complex64) for name in own}, "cannot read"),
    (lambda own: {name: own[name].astype(ml_dtypes.float8_e4m3fn) for name in own}, "cannot read"),
    (lambda own: {}, "no LoRA factors"),
])  # fmt: skip
def test_tensors_that_are_not_of_this_base_are_refused(base, tmp_path, change, told):
    adapter = write_adapter(tmp_path, random_factors(base, [(2, "query")]))
    with_tensors(adapter, change)
    with pytest.raises(moeret.ConfigError, match=told):
        read_adapter(adapter, base, WHOLE)


def test_files_that_are_missing_or_damaged_are_named(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", random_factors(base, [(2, "query")]))
    for name, told in (("adapter_model.safetensors", "cannot read"), ("adapter_config.json", "cannot read")):
        whole = (adapter / name).read_bytes()
        for damaged in (whole[:20], b"[]"):
            (adapter / name).write_bytes(damaged)
            with pytest.raises(moeret.ConfigError, match=f"{told} .*{name}"):
                read_adapter(adapter, base, WHOLE)
        (adapter / name).unlink()
        with pytest.raises(moeret.ConfigError, match=f"it has no {name}"):
            read_adapter(adapter, base, WHOLE)
        (adapter / name).write_bytes(whole)
    with pytest.raises(moeret.ConfigError, match="is no PEFT adapter"):
        read_adapter(tmp_path / "missing", base, WHOLE)


def test_what_the_experts_have_no_place_for_is_refused_with_what_a_model_would_need(base, tmp_path):
    adapter = write_adapter(tmp_path, random_factors(base, [(0, "query"), (2, "value"), (2, "mlp_in")]))
    narrow = moeret.ExpertConfig(rank=2, layers=2, matrices=("query", "value"))
    with pytest.raises(moeret.ConfigError) as caught:
        read_adapter(adapter, base, narrow)
    needed = "moeret train --expert.rank 4 --expert.layers 3 --expert.matrices query value mlp_in`"
    assert needed in str(caught.value)
    with pytest.raises(moeret.ConfigError, match=r"train --expert\.layers 3`"):
        read_adapter(adapter, base, moeret.ExpertConfig(rank=4, layers=2))


@pytest.fixture(scope="module")
def with_adapter(model_folder, two_domains, tmp_path_factory):
    """A model without metal, the adapter that metal's expert makes, and the model that has it again as that."""
    root = tmp_path_factory.mktemp("imported")
    shutil.copytree(model_folder, root / "m")
    before = moeret.Model.load(root / "m")
    [file] = [entry["file"] for entry in before.published.meta["experts"] if entry["name"] == "metal"]
    delta = read_expert(before.published, file)
    factors = {
        (int(layer[-2:]), matrix): (own["a"].T, own["b"].T)
        for layer, matrices in delta.items()
        for matrix, own in matrices.items()
    }
    adapter = write_adapter(root / "adapter", factors, r=8, lora_alpha=8)
    moeret.remove_expert(root / "m", "metal")
    published = moeret.add_expert(root / "m", "metal", two_domains["metal"], peft=adapter)
    return root, delta, published


def test_an_adapter_goes_the_way_of_an_expert_that_was_trained(with_adapter):
    root, delta, published = with_adapter
    entry = published.meta["experts"][-1]
    assert (entry["name"], entry["step"], entry["added"]) == ("metal", 0, True)
    assert entry["strength"] in OWN and entry["shared_strength"] in SHARED and entry["strength"] > 0
    assert entry["dev_ndcg"]["all"] > entry["base_dev_ndcg"]["all"]
    model, shared = moeret.Model.load(root / "m"), read_shared(published).delta
    weak = {
        layer: {matrix: f | {"b": entry["strength"] * f["b"]} for matrix, f in matrices.items()}
        for layer, matrices in delta.items()
    }
    wanted = embeddings(model, experts.joined(weak, shared, entry["shared_strength"]))
    np.testing.assert_allclose(model.encode_query(QUERIES, expert="metal"), wanted, atol=1e-6)
    assert max(model.route(["find the metal nick3"])[0].probabilities.items(), key=lambda own: own[1])[0] == "metal"


def test_the_same_adapter_again_is_the_same_expert_and_another_is_none(with_adapter, two_domains, base, tmp_path):
    root, _, published = with_adapter
    how = (root / "m", "metal", two_domains["metal"])
    assert moeret.add_expert(*how, peft=root / "adapter").fingerprint == published.fingerprint
    other = write_adapter(tmp_path, random_factors(base, [(2, "query")]))
    for adapter in (other, None):
        with pytest.raises(moeret.ConfigError, match="made from other data or settings"):
            moeret.add_expert(*how, peft=adapter)
    with pytest.raises(moeret.ConfigError, match="does not go with peft"):
        moeret.add_expert(*how, peft=other, label_free=True)


def test_an_adapter_that_helps_nobody_leaves_the_base(model_folder, domains, base, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    adapter = write_adapter(tmp_path / "a", random_factors(base, [(2, matrix) for matrix in MATRICES]), lora_alpha=400)
    entry = moeret.add_expert(tmp_path / "m", "river", domains["river"], peft=adapter).meta["experts"][-1]
    assert entry["strength"] == 0 and entry["dev_ndcg"]["all"] >= entry["base_dev_ndcg"]["all"]


def test_the_command_takes_an_adapter_of_one_domain(model_folder, domains, base, tmp_path, capsys, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "m")
    adapter = write_adapter(tmp_path / "a", random_factors(base, [(0, "query")]))
    command = ["moeret", "experts", "add", str(tmp_path / "m"), "--peft", str(adapter), "--json"]
    river = ["--domain", f"river={domains['river']}"]
    for more, told in ((river, "--expert.layers 3"), ([*river, *river[:1], f"r={domains['river']}"], "one domain's")):
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1 and told in capsys.readouterr().err
    assert not (tmp_path / "m" / "training" / "add-river").exists()
    write_adapter(adapter, random_factors(base, [(1, "query")]))
    monkeypatch.setattr("sys.argv", [*command, *river])
    main()
    assert json.loads(capsys.readouterr().out)["experts"][-1]["name"] == "river"


def test_with_both_towers_an_adapter_embeds_documents_too(base_folder, two_domains, domains, base, tmp_path):
    config = moeret.TrainConfig(
        tower="both", steps=2, batch_size=8, evaluate_every=2, expert=moeret.ExpertConfig(rank=4, layers=2)
    )
    moeret.train({"fruit": two_domains["fruit"]}, tmp_path / "m", base=str(base_folder), config=config)
    adapter = write_adapter(tmp_path / "a", random_factors(base, [(2, matrix) for matrix in MATRICES]), lora_alpha=0.1)
    entry = moeret.add_expert(tmp_path / "m", "river", domains["river"], peft=adapter).meta["experts"][-1]
    model, delta = moeret.Model.load(tmp_path / "m"), read_adapter(adapter, base, config.expert)
    own = {
        layer: {matrix: f | {"b": np.float32(entry["strength"]) * f["b"]} for matrix, f in matrices.items()}
        for layer, matrices in delta.items()
    }
    assert entry["step"] == 0 and entry["calibration"]
    np.testing.assert_allclose(model.encode_document(QUERIES, expert="river"), embeddings(model, own), atol=1e-6)


@pytest.mark.parametrize("how", [
    {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query", "dense"]},
    {"r": 8, "lora_alpha": 8, "target_modules": ["key", "value", "dense"], "rank_pattern": {"layer.1.*key": 3},
     "alpha_pattern": {"value": 5, "layer.2.output.dense": 31}},
])  # fmt: skip
def test_an_adapter_of_peft_gives_the_embeddings_that_it_has_there(base_folder, tmp_path, how):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(base_folder), device="cpu")
    plain = theirs.encode(QUERIES)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(theirs[0].auto_model, peft.LoraConfig(task_type="FEATURE_EXTRACTION", **how))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs[0].auto_model = peft.PeftModel.from_pretrained(adapted.unload(), str(tmp_path / "adapter"))
    wanted = theirs.encode(QUERIES)
    model = moeret.Model.load(base_folder)
    found = embeddings(model, read_adapter(tmp_path / "adapter", model.base, WHOLE))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted - plain).max() > 1e-2
