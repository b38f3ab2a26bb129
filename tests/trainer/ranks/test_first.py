"""What one rank does while the others wait."""

import multiprocessing
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from tests.support.zygote import free_port
from trainer.ranks.first import from_first
from trainer.ranks.signals import Stopped
from trainer.ranks.world import World


def test_the_others_get_what_the_first_found_or_stop_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def rank(number: int) -> None:
        if number == 0:
            store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        me = World(number, number, 2, torch.device("cpu"))

        def slow() -> dict:
            assert number == 0
            time.sleep(1)
            return {"train": "x.beton"}

        def stopped() -> None:
            raise Stopped

        found = [from_first(me, slow)]
        try:
            from_first(me, stopped)
        except Stopped:
            found.append("stopped")
        results.put((number, found))
        if number == 0:
            time.sleep(3)  # the store is here
            del store

    ranks = [fork.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    got = dict(results.get(timeout=100) for _ in ranks)
    for process in ranks:
        process.join()
    assert got == {number: [{"train": "x.beton"}, "stopped"] for number in range(2)}


def test_one_rank_just_does_it() -> None:
    assert from_first(World(0, 0, 1, torch.device("cpu")), lambda: 3) == 3
