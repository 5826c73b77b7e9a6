"""The whole way on two tiny domains: train, index, search, evaluate."""

import moeret


def test_routed_search_beats_the_base_and_finds_what_was_learned(index_folder, two_domains):
    retriever = moeret.Retriever.load(index_folder)
    report = moeret.evaluate(retriever, two_domains, baselines=True)
    systems = report["systems"]
    assert systems["auto"]["mean"]["nDCG@10"] > systems["base_one_index"]["mean"]["nDCG@10"] + 0.1
    assert report["router"]["accuracy"] > 0.8
    hit = retriever.search("find the metal nick10", k=1)[0]
    assert (hit.expert, hit.title, hit.rank) == ("metal", "silver", 1)
