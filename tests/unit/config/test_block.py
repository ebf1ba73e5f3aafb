"""The "spotspeed" block: what is accepted, and that every refusal names the key and the way out."""

from typing import Any

import pytest

from spotspeed.config import find_block, near_misses, parse_block
from spotspeed.errors import ConfigError


def test_a_path_is_enough_and_the_defaults_are_the_documented_ones() -> None:
    config = parse_block({"path": "/shared/run"})
    assert (config.interval.steps, config.interval.seconds) == (None, 600.0)
    assert (config.keep.last, config.keep.every_steps) == (3, None)
    assert config.notice.signals == ("SIGTERM", "SIGUSR1")
    assert (config.notice.deadline_s, config.on_interrupt.exit_code) == (120.0, 75)
    assert (config.staging.check, config.staging.max_hold_s) == ("sampled", 30.0)


def test_an_integral_number_is_a_number_of_seconds() -> None:
    assert parse_block({"path": "x", "interval": {"seconds": 5}}).interval.seconds == 5.0


def test_a_config_without_the_block_has_none() -> None:
    assert find_block({"train_batch_size": 8}) is None


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({}, ["path", "required"]),
        ("/shared/run", ["must be an object", '{"path":']),
        ({"path": ""}, ["path"]),
        ({"path": 3}, ["path", "string", "3"]),
        ({"path": " "}, ["path", "names nothing"]),
        ({"path": "x", "local_path": "a\0b"}, ["local_path", "names nothing"]),
        ({"path": "x", "notice": {"file": ""}}, ["notice.file", "names nothing"]),
        ({"path": "x", "staging": {"max_hold_s": 1e30}}, ["staging.max_hold_s", "1000000000"]),
        ({"path": "x", "interval": {"seconds": 1e30}}, ["interval.seconds", "1000000000"]),
        ({"path": "memory://run"}, ["path", "memory of one process", "directory or a bucket"]),
        ({"path": "simplecache::memory://run"}, ["path", "memory of one process"]),
        ({"path": "x", "intervall": {}}, ["intervall", 'did you mean "interval"']),
        ({"path": "x", "interval": {"step": 3}}, ["interval.step", 'did you mean "steps"']),
        ({"path": "x", "interval": {"steps": 0}}, ["interval.steps", "greater than 0"]),
        ({"path": "x", "interval": {"steps": "10"}}, ["interval.steps", "'10'"]),
        ({"path": "x", "interval": {"seconds": float("nan")}}, ["interval.seconds"]),
        ({"path": "x", "notice": {"signals": ["SIGKILL"]}}, ["notice.signals", "SIGKILL"]),
        ({"path": "x", "notice": {"signals": ["TERM"]}}, ["notice.signals", "TERM"]),
        ({"path": "x", "compression": "gzip"}, ["compression", "gzip"]),
        ({"path": "x", "on_interrupt": {"exit_code": 0}}, ["on_interrupt.exit_code"]),
        ({"path": "x", "keep": "all"}, ["keep", "all"]),
    ],
)
def test_a_wrong_block_is_one_error_that_names_the_key(block: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block(block)
    for words in said:
        assert words in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"interval": {"step": 1}, "keep": {"last": -1}})
    for key in ("path", "interval.step", "keep.last"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("interval.adaptive", {"interval": {"adaptive": True}}),
        ("metrics.port", {"metrics": {"port": 9000}}),
    ],
)
def test_a_setting_that_is_not_built_is_refused_and_not_ignored(
    key: str, block: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{key}: this version has only the default"):
        parse_block({"path": "x", **block})


def test_the_tier_of_a_node_is_a_directory_and_no_url() -> None:
    assert parse_block({"path": "s3://b/run", "local_path": "/nvme"}).local_path == "/nvme"
    with pytest.raises(ConfigError, match=r"local_path: .*s3:// URL is no disk of this node"):
        parse_block({"path": "s3://b/run", "local_path": "s3://b/fast"})


def test_a_near_miss_of_the_block_is_found() -> None:
    assert near_misses({"spotsped": {}, "zero_optimization": {}}) == ["spotsped"]
    assert near_misses({"spotspeed": {}, "zero_optimization": {}}) == []
