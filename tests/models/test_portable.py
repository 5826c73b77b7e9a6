"""An exported expert embeds elsewhere as it does here."""

import json

import numpy as np
import pytest
from conftest import QUERIES
from safetensors.numpy import load_file

import moeret
from moeret.cli import main
from moeret.models.portable import export_expert


@pytest.fixture(scope="module")
def model(model_folder):
    return moeret.Model.load(model_folder)


@pytest.mark.parametrize("expert", ["fruit", "metal", "shared"])
def test_a_merged_folder_is_a_base_with_the_experts_embeddings(model, tmp_path, expert):
    out = export_expert(model, expert, tmp_path / "merged")
    merged = moeret.Model.load(out)
    expected = model.encode_query(QUERIES, expert=expert)
    np.testing.assert_allclose(merged.encode_query(QUERIES), expected, atol=1e-5)
    assert np.abs(expected - model.encode_query(QUERIES)).max() > 1e-3
    original, written = (load_file(folder / "model.safetensors") for folder in (model.base.folder, out))
    assert {name: array.shape for name, array in written.items()} == {
        name: array.shape for name, array in original.items()
    }


def test_an_adapters_factors_are_what_the_expert_adds(model, tmp_path):
    merged, adapter = (export_expert(model, "metal", tmp_path / to, to) for to in ("sentence-transformers", "peft"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 + 4  # its own rank and the shared delta's
    before, after = (load_file(folder / "model.safetensors") for folder in (model.base.folder, merged))
    factors = load_file(adapter / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    assert len(modules) == len(factors) / 2
    for name, array in before.items():
        added = 0
        if name.removesuffix(".weight") in modules:
            a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
            added = b @ a
        np.testing.assert_allclose(array + added, after[name], atol=1e-5)


def test_what_cannot_be_exported_is_refused(model, model_folder, tmp_path, capsys, monkeypatch):
    for expert, told in (("base", "the base itself"), ("law", "law")):
        with pytest.raises(moeret.ConfigError, match=told):
            export_expert(model, expert, tmp_path / "out")
    with pytest.raises(moeret.ConfigError, match="sentence-transformers or peft"):
        export_expert(model, "fruit", tmp_path / "out", "onnx")
    (tmp_path / "there").mkdir()
    with pytest.raises(moeret.ConfigError, match="there already"):
        export_expert(model, "fruit", tmp_path / "there")
    monkeypatch.setattr(
        "sys.argv", ["moeret", "export", str(model_folder), "--format", "peft", "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "wants --expert" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_exports(model_folder, tmp_path, capsys, monkeypatch):
    command = ["moeret", "export", str(model_folder), "--expert", "fruit", "--format", "sentence-transformers", "--out"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "fruit"), "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["expert"] == "fruit"
    assert moeret.Model.load(tmp_path / "fruit").encode_query(["kiwi"]).shape == (1, 16)


def test_sentence_transformers_gives_the_same_embeddings(model, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    out = export_expert(model, "metal", tmp_path / "merged")
    found = library.SentenceTransformer(str(out), device="cpu").encode(QUERIES)
    np.testing.assert_allclose(found, model.encode_query(QUERIES, expert="metal"), atol=1e-5)


def test_peft_gives_the_same_embeddings(model, tmp_path):
    library, peft = pytest.importorskip("sentence_transformers"), pytest.importorskip("peft")
    out = export_expert(model, "metal", tmp_path / "adapter", "peft")
    base = library.SentenceTransformer(str(model.base.folder), device="cpu")
    before = base.encode(QUERIES)
    base[0].auto_model = peft.PeftModel.from_pretrained(base[0].auto_model, str(out))
    found = base.encode(QUERIES)
    np.testing.assert_allclose(found, model.encode_query(QUERIES, expert="metal"), atol=1e-5)
    assert np.abs(found - before).max() > 1e-3
