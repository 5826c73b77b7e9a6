"""What a long job tells: a bar on a terminal, lines in a log, nothing unasked."""

import pytest

from moeret import progress
from moeret.progress import announce, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_lines_with_the_time_left_and_how_it_ended(capsys, clock):
    with progress_bar("Training", 1200, shown=True, unit="steps", start=200) as advance:
        for _ in range(5):
            clock[0] += 12.0
            advance(100, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Training: 500 of 1,200 steps, 8.3/s, 0:01:24 left, loss 0.5",
        "Training: 700 of 1,200 steps, 8.3/s, 0:01:00 left, loss 0.5",
    ]


def test_a_job_that_fails_or_ends_early_tells_how_far_it_was(capsys, clock):
    with pytest.raises(OSError), progress_bar("Embedding", 10, shown=True, unit="texts") as advance:
        clock[0] += 2.0
        advance(1, "law 1")
        raise OSError
    with progress_bar("Embedding", 5000, shown=True, unit="texts") as advance:
        clock[0] += 2.0
        advance(5000, "law 5,000")
        advance(0)  # the note stays
    assert capsys.readouterr().err.splitlines() == [
        "Embedding: 1 of 10 texts, 0.5/s, 0:00:18 left, law 1",
        "Embedding: 5,000 of 5,000 texts, 2,500/s, law 5,000",
    ]


def test_a_terminal_has_one_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("Training", 3, shown=True, unit="steps") as advance:
        for _ in range(3):
            advance(1, "loss 0.25")
    drawn = capsys.readouterr().err
    assert "\x1b[" in drawn and "loss 0.25" in drawn and "3/3" in drawn


def test_on_a_narrow_terminal_the_note_gives_way(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    with progress_bar("Embedding", 3, shown=True, unit="documents") as advance:
        for _ in range(3):
            advance(1, "16% padding, " + ", ".join(f"expert-of-domain-{number} 4,096" for number in range(3)))
    drawn = capsys.readouterr().err
    assert (
        "3/3" in drawn and "documents," in drawn and "16% padding" in drawn and "…" in drawn and "domain-2" not in drawn
    )


def test_nothing_is_told_unasked_or_where_nothing_is_left(capsys):
    announce("next", shown=False)
    for shown, total in ((False, 5), (True, 3)):
        with progress_bar("Training", total, shown=shown, start=3) as advance:
            advance()
    assert capsys.readouterr() == ("", "")
    announce("[b]next[/b]", shown=True)
    assert capsys.readouterr().err == "[b]next[/b]\n"
