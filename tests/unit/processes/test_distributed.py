"""One rank alone; many ranks: distributed/."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.processes import distributed


def test_without_a_process_group_there_is_one_rank() -> None:
    assert distributed.rank() == 0
    assert distributed.world_size() == 1


def test_one_rank_keeps_its_own_object() -> None:
    value = {"a": [1]}
    assert distributed.broadcast_object(value) is value


def test_one_rank_raises_its_own_error() -> None:
    error = ConfigError("wrong")
    distributed.fail_together(None)
    with pytest.raises(ConfigError) as caught:
        distributed.fail_together(error)
    assert caught.value is error


def test_together_lets_the_error_of_its_block_through() -> None:
    with distributed.together():
        pass
    with pytest.raises(ConfigError, match="wrong"), distributed.together():
        raise ConfigError("wrong")


def test_an_interruption_is_not_gathered_from_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be anywhere; a collective would hang."""
    monkeypatch.setattr(distributed, "fail_together", lambda error: pytest.fail("a collective"))
    with pytest.raises(KeyboardInterrupt), distributed.together():
        raise KeyboardInterrupt


def test_foreign_errors_are_described_with_their_kind() -> None:
    assert distributed._describe(ConfigError("no such key")) == "no such key"
    assert distributed._describe(ValueError("odd")) == "ValueError: odd"


def test_a_resource_is_let_go_when_its_block_fails() -> None:
    events: list[str] = []

    @contextmanager
    def resource() -> Iterator[None]:
        events.append("held")
        try:
            yield
        finally:
            events.append("let go")

    with pytest.raises(ConfigError), distributed.held_by_rank_0(resource()):
        raise ConfigError("wrong")
    assert events == ["held", "let go"]


def test_without_a_process_group_rank_0_is_this_process() -> None:
    assert distributed.from_rank_0(lambda: "made here") == "made here"


def test_what_rank_0_cannot_make_is_an_error() -> None:
    def cannot() -> None:
        raise OSError("no such folder")

    with pytest.raises(OSError, match="no such folder"):
        distributed.from_rank_0(cannot)
