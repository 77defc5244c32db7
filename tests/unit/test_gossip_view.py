"""What ranks say of one of several models."""

from types import SimpleNamespace

from dllm.peers.gossip_view import GossipView


def test_a_view_has_what_belongs_to_the_rank_and_to_its_model_alone():
    models = {
        0: [{"slots": 1, "rows": {0: "a"}}, {"slots": 2, "rows": {}}],
        3: [{"slots": 3, "rows": {}}, {"slots": 4, "rows": {}}],
    }
    reports = {rank: {"host": f"h{rank}", "rows": {5: "of the rank"}, "models": models[rank]} for rank in models}
    known = {rank: (7 + rank, report) for rank, report in reports.items()}
    gossip = SimpleNamespace(rank=3, known=known, table=lambda: {rank: (reports[rank], 0.5, rank == 3) for rank in reports})
    for place, slots in enumerate([{0: 1, 3: 3}, {0: 2, 3: 4}]):
        view = GossipView(gossip, place)
        assert view.rank == 3
        assert {rank: (count, report["slots"], report["host"]) for rank, (count, report) in view.known.items()} == {
            rank: (7 + rank, slots[rank], f"h{rank}") for rank in slots
        }
        table = view.table()
        assert {rank: (report["slots"], age, dead) for rank, (report, age, dead) in table.items()} == {
            rank: (slots[rank], 0.5, rank == 3) for rank in slots
        }
        assert table[0][0]["rows"] == models[0][place]["rows"]
