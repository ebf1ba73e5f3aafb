"""The hooks fire where a step begins and ends, and an engine without hooks notices nothing."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref

import pytest

from spotspeed.errors import CaptureError
from spotspeed.state import boundary
from spotspeed.state.boundary import PASS, bind, binding_of, install_hooks, unbind


def make_engine_class():
    """A class with the methods of DeepSpeedEngine that are wrapped (the real one: see tests/)."""

    class Engine:
        def __init__(self, size, *, name="engine"):
            """Make it."""
            self.calls, self.size, self.fails = [], size, False

        def _take_model_step(self, lr_kwargs):
            self.calls.append(("update", lr_kwargs))
            if self.fails:
                raise ArithmeticError("in the update")
            return "updated"

        def forward(self, *inputs, **kwargs):
            self.calls.append(("forward", inputs))
            return inputs

        def save_checkpoint(self, save_dir, tag=None, client_state=None, save_latest=True):
            self.calls.append(("save", save_dir, tag))
            return True

        def load_checkpoint(self, load_dir, tag=None):
            self.calls.append(("load", load_dir, tag))
            return load_dir, {}

        def destroy(self):
            self.calls.append(("destroy",))

    return Engine


class Recorder:
    """Hooks that write down what they were called with."""

    def __init__(self, *, save=PASS, load=PASS):
        self.save, self.load, self.seen = save, load, []

    def before_update(self, engine):
        self.seen.append("before_update")
        engine.calls.append("before")

    def after_update(self, engine):
        self.seen.append("after_update")
        engine.calls.append("after")

    def before_forward(self, engine):
        self.seen.append("before_forward")

    def on_save(self, engine, arguments):
        self.seen.append(("on_save", dict(arguments)))
        return self.save

    def on_load(self, engine, arguments, original):
        self.seen.append(("on_load", dict(arguments)))
        return self.load

    def on_destroy(self, engine):
        self.seen.append("on_destroy")


@pytest.fixture
def engine():
    cls = make_engine_class()
    install_hooks(cls)
    return cls(3)


def test_the_update_runs_between_its_two_hooks(engine):
    hooks = Recorder()
    bind(engine, hooks)
    assert engine._take_model_step({"epoch": 1}) == "updated"
    assert engine.calls == ["before", ("update", {"epoch": 1}), "after"]


def test_a_failed_update_passes_its_error_on_and_is_not_completed(engine):
    hooks = Recorder()
    bind(engine, hooks)
    engine.fails = True
    with pytest.raises(ArithmeticError, match="in the update"):
        engine._take_model_step(None)
    assert hooks.seen == ["before_update"]


def test_an_update_whose_gate_raises_does_not_begin(engine):
    class Leaves(Recorder):
        def before_update(self, engine):
            raise SystemExit(75)

    bind(engine, Leaves())
    with pytest.raises(SystemExit):
        engine._take_model_step(None)
    assert engine.calls == []


def test_engines_without_hooks_are_left_alone(engine):
    hooks = Recorder()
    other = type(engine)(4)
    bind(engine, hooks)
    other._take_model_step(None)
    assert other.save_checkpoint("d") is True
    assert other.load_checkpoint("d") == ("d", {})
    other.forward(1)
    other.destroy()
    assert hooks.seen == []


def test_several_engines_have_hooks_of_their_own(engine):
    first, second = Recorder(), Recorder()
    other = type(engine)(4)
    bind(engine, first)
    bind(other, second)
    engine._take_model_step(None)
    assert (len(first.seen), len(second.seen)) == (2, 0)
    other._take_model_step(None)
    assert (len(first.seen), len(second.seen)) == (2, 2)


def test_forward_calls_the_hook_only_while_it_is_watched(engine):
    hooks = Recorder()
    binding = bind(engine, hooks)
    engine.forward(1)
    assert hooks.seen == []
    binding.watches_forward = True
    assert engine.forward(2) == (2,)
    binding.watches_forward = False
    engine.forward(3)
    assert hooks.seen == ["before_forward"]


def test_save_and_load_see_their_arguments_by_name(engine):
    hooks = Recorder(save="saved", load=("here", {"a": 1}))
    bind(engine, hooks)
    assert engine.save_checkpoint("out", "tag-1", client_state={"a": 1}) == "saved"
    assert engine.load_checkpoint(load_dir="in") == ("here", {"a": 1})
    assert hooks.seen == [
        ("on_save", {"save_dir": "out", "tag": "tag-1", "client_state": {"a": 1},
                     "save_latest": True}),
        ("on_load", {"load_dir": "in", "tag": None}),
    ]  # fmt: skip
    assert engine.calls == []
    with pytest.raises(TypeError):
        engine.save_checkpoint()


def test_pass_lets_the_original_run(engine):
    bind(engine, Recorder())
    assert engine.save_checkpoint("out", tag="t") is True
    assert engine.load_checkpoint("in") == ("in", {})
    assert engine.calls == [("save", "out", "t"), ("load", "in", None)]


def test_none_and_false_are_results_and_do_not_fall_through(engine):
    bind(engine, Recorder(save=None, load=False))
    assert engine.save_checkpoint("out") is None
    assert engine.load_checkpoint("in") is False
    assert engine.calls == []


def test_destroy_is_told_once_and_destroys_even_when_the_hook_fails(engine):
    class Fails(Recorder):
        def on_destroy(self, engine):
            super().on_destroy(engine)
            raise OSError("not durable")

    hooks = Fails()
    bind(engine, hooks)
    with pytest.raises(OSError, match="not durable"):
        engine.destroy()
    engine.destroy()
    assert hooks.seen == ["on_destroy"]
    assert engine.calls == [("destroy",), ("destroy",)]


def test_unbound_hooks_are_not_called_again_even_within_the_update(engine):
    class Detaches(Recorder):
        def before_update(self, engine):
            super().before_update(engine)
            unbind(engine)

    hooks = Detaches()
    bind(engine, hooks)
    engine._take_model_step(None)
    engine._take_model_step(None)
    assert hooks.seen == ["before_update"]
    unbind(engine)


def test_a_second_binding_is_refused_until_the_first_is_gone(engine):
    first = bind(engine, Recorder())
    assert binding_of(engine) is first
    with pytest.raises(CaptureError, match="attached already"):
        bind(engine, Recorder())
    unbind(engine)
    assert binding_of(engine) is None
    bind(engine, Recorder())


def test_signatures_names_and_docstrings_are_unchanged():
    cls, wrapped = make_engine_class(), make_engine_class()
    install_hooks(wrapped)
    for name in ("__init__", "_take_model_step", "forward", "save_checkpoint", "destroy"):
        before, after = getattr(cls, name), getattr(wrapped, name)
        assert inspect.signature(before) == inspect.signature(after)
        assert (before.__name__, before.__doc__) == (after.__name__, after.__doc__)


def test_installing_twice_wraps_once_even_below_another_wrap(engine):
    cls = type(engine)
    inner = cls._take_model_step

    @functools.wraps(inner)
    def traced(self, *args):
        self.calls.append("traced")
        return inner(self, *args)

    cls._take_model_step = traced
    install_hooks(cls)
    assert cls._take_model_step is traced
    hooks = Recorder()
    bind(engine, hooks)
    engine._take_model_step(None)
    assert hooks.seen == ["before_update", "after_update"]


def test_a_class_without_the_methods_is_refused():
    class Odd:
        def forward(self):
            pass

    with pytest.raises(CaptureError, match=r"Odd has no _take_model_step, save_checkpoint"):
        install_hooks(Odd)


def test_nothing_keeps_a_bound_engine_alive():
    engine = make_engine_class()(1)
    reference = weakref.ref(engine)
    bind(engine, Recorder())
    engine._take_model_step(None)
    del engine
    gc.collect()
    assert reference() is None


def test_new_engines_are_announced_once_when_they_are_complete(monkeypatch):
    base = make_engine_class()

    class Pipeline(base):
        def __init__(self, size):
            super().__init__(size)
            self.is_complete = True

    install_hooks(base)
    seen = []
    monkeypatch.setattr(boundary, "_new_engine_callbacks", [
        lambda engine: seen.append((type(engine), getattr(engine, "is_complete", None)))
    ])  # fmt: skip
    base(1)
    Pipeline(1)
    assert seen == [(base, None), (Pipeline, True)]


def test_an_engine_that_could_not_be_made_is_not_announced(monkeypatch):
    cls = make_engine_class()
    install_hooks(cls)
    seen = []
    monkeypatch.setattr(boundary, "_new_engine_callbacks", [seen.append])
    with pytest.raises(TypeError):
        cls()
    assert seen == []
