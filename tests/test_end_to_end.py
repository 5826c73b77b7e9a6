"""The whole way on two tiny domains: train, index, search, evaluate."""

from conftest import TOPICS

import moeret


def test_routed_search_beats_the_base_and_finds_what_was_learned(index_folder, two_domains):
    retriever = moeret.Retriever.load(index_folder)
    report = moeret.evaluate(retriever, two_domains, baselines=True)
    systems = report["systems"]
    assert systems["auto"]["mean"]["nDCG@10"] > systems["base_one_index"]["mean"]["nDCG@10"] + 0.1
    assert report["router"]["accuracy"] > 0.8
    hits = retriever.search("find the metal nick10", k=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert all(hit.title in TOPICS[hit.expert] for hit in hits)
