"""Compiled programs outlive the process."""

import os
import subprocess
import sys

import jax

from moeret.models import compilation

THE_WHOLE_WAY = """
import collections, pathlib, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
import moeret
base, out, *folders = sys.argv[1:]
domains = {pathlib.Path(folder).name: folder for folder in folders}
config = moeret.TrainConfig(steps=4, shared_steps=2, batch_size=8, evaluate_every=2)
moeret.train(domains, out + "/model", base=base, config=config)
moeret.build_index(out + "/model", out + "/index", domains)
retriever = moeret.Retriever.load(out + "/index")
retriever.search("gold and silver")
retriever.close()
print(counts["cache_hits"], counts["cache_misses"])
"""


def test_a_second_process_compiles_nothing(tmp_path, base_folder, two_domains):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def hits_and_misses(out):
        command = [sys.executable, "-c", THE_WHOLE_WAY, base_folder, tmp_path / out, *two_domains.values()]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return [int(count) for count in run.stdout.split()]

    assert hits_and_misses("first")[1] > 10
    hits, misses = hits_and_misses("second")
    assert hits > 10
    assert misses == 0


def test_a_cache_of_the_users_own_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
    assert not any(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation.keep_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
