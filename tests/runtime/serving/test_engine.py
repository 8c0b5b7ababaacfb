"""Answers that are computed together are those of each alone, whoever comes and goes meanwhile."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint, native_forward
from nashswarm.runtime.serving.answer import Answer, Piece, Prompt
from nashswarm.runtime.serving.engine import Engine, FailedError, FullError, LateError, Limits
from nashswarm.runtime.serving.replies import merge
from nashswarm.runtime.serving.steps import ModuleStepper

Greedy = Callable[[Sequence[int], int], list[int]]
ENDS = frozenset({0})


class Listener:
    """Prompts in an engine, and what comes of them."""

    def __init__(self, engine: Engine, *prompts: Prompt) -> None:
        self.queues: list[queue.Queue[Piece | Exception]] = [queue.Queue() for _ in prompts]
        self.answers: list[Answer] = engine.submit(prompts, lambda number, piece: self.queues[number].put(piece))

    def piece(self, number: int = 0) -> Piece:
        piece = self.queues[number].get(timeout=60)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def whole(self, number: int = 0) -> Piece:
        pieces = [self.piece(number)]
        while pieces[-1].finish is None:
            pieces.append(self.piece(number))
        return merge(pieces)

    def tokens(self, number: int = 0) -> list[int]:
        self.whole(number)
        return self.answers[number].made


@pytest.fixture
def engine(tiny: Any, tokenizer: Any) -> Iterator[Callable[..., Engine]]:
    """Limits → an engine of the tiny model."""
    made: list[Engine] = []

    def build(stepper: Any = None, ends: frozenset[int] = ENDS, **limits: Any) -> Engine:
        made.append(Engine(stepper or ModuleStepper(tiny), tokenizer, ends, Limits(**limits)))
        return made[-1]

    yield build
    for one in made:
        one.close()


def prompts(count: int, most: int, seed: int = 0, **options: Any) -> list[Prompt]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=random).tolist()
    options = {"temperature": 0.0} | options
    return [Prompt(torch.randint(1, 512, (length,), generator=random).tolist(), most, **options) for length in lengths]


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers_equal_greedy_loop_however_they_share_steps(
    batch: int, piece: int, engine: Callable[..., Engine], gate: Any, greedy: Greedy
) -> None:
    asked = prompts(9, 12, seed=piece)
    gate.piece = piece
    running = engine(gate, batch=batch)
    listeners = [Listener(running, *asked[:5]), *(Listener(running, prompt) for prompt in asked[5:])]
    gate.open.set()
    answered = [listeners[0].tokens(number) for number in range(5)] + [one.tokens() for one in listeners[1:]]
    assert answered == [greedy(prompt.tokens, 12) for prompt in asked]
    assert max(gate.sizes) <= batch and (min(batch, piece) < 4 or max(gate.sizes) > 3)
    assert running.admitted == 0


class Noted(ModuleStepper):
    """Steps that note how many texts and how many tokens share each; ``broken``: a token that cannot be read."""

    broken = -1

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.shared: list[tuple[int, int]] = []

    def extend(self, caches: Any, pieces: Any) -> Any:
        if any(self.broken in piece for piece in pieces):
            raise MemoryError("no memory is left")
        self.shared.append((len(pieces), sum(map(len, pieces))))
        return super().extend(caches, pieces)

    def read(self, cache: Any, tokens: Any, every: bool) -> Any:
        if self.broken in tokens:
            raise MemoryError("no memory is left")
        return super().read(cache, tokens, every)


@pytest.fixture
def noted(model: Any, packed: Callable[..., Any]) -> Noted:
    """Steps of a model that the library computes."""
    checkpoint.adopt(model, find_layers(model), packed(model, "trellis"))
    return Noted(native_forward.natively(model))


def test_prompts_and_steps_share_passes_and_answers_are_those_of_each_alone(
    engine: Callable[..., Engine], noted: Noted
) -> None:
    asked = [*prompts(12, 6, seed=2), *prompts(2, 4, seed=9, scored=True, alternatives=1)]
    alone = engine(noted, ends=frozenset())
    expected = [Listener(alone, prompt).tokens() for prompt in asked]
    noted.shared.clear()
    together = Listener(engine(noted, ends=frozenset()), *asked)
    assert [together.tokens(number) for number in range(len(asked))] == expected
    assert len(noted.shared) < len(asked), "prompts have passes of their own"
    assert max(tokens for _, tokens in noted.shared) <= noted.piece


def test_texts_that_fail_together_are_computed_alone(
    engine: Callable[..., Engine], noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompts(4, 5)
    expected = [Listener(engine(noted, ends=frozenset()), prompt).tokens() for prompt in asked]
    asked.insert(1, Prompt([3, 511, 4], 5, 0.0))
    noted.broken = 511
    listener = Listener(engine(noted, ends=frozenset()), *asked)
    with pytest.raises(FailedError, match="the request could not be computed: MemoryError"):
        listener.piece(1)
    assert [listener.tokens(number) for number in (0, 2, 3, 4)] == expected
    assert "could not be computed together: each is computed alone" in caplog.text


def test_answers_drawn_with_seed_do_not_depend_on_others(engine: Callable[..., Engine]) -> None:
    asked = [Prompt([1, 2, 3], 20, 1.3, 0.9, seed) for seed in (1, 2, 1)]
    alone = [Listener(engine(), prompt).tokens() for prompt in asked]
    together = Listener(engine(), *asked)
    assert [together.tokens(number) for number in range(3)] == alone
    assert alone[0] == alone[2] != alone[1]


def test_cancelled_answers_leave_batch_and_change_no_other(
    engine: Callable[..., Engine], gate: Any, greedy: Greedy
) -> None:
    asked = prompts(6, 30)
    running = engine(gate, batch=4, ends=frozenset())
    listener = Listener(running, *asked)
    gate.pause = 4 + 3  # four prompts are read, and the third step waits
    gate.open.set()
    listener.piece(1)
    while gate.open.is_set():
        time.sleep(0.001)
    running.cancel([listener.answers[1], listener.answers[4]])  # one computed, one waiting
    assert running.admitted == 4
    gate.open.set()
    for number in (0, 2, 3, 5):
        made = listener.tokens(number)
        expected = greedy(asked[number].tokens, 30)
        assert made[: len(expected)] == expected and len(made) == 30
    assert len(listener.answers[1].made) <= 4 and listener.answers[4].made == []
    assert gate.sizes[:3] == [4, 4, 4] and listener.answers[1].cache is None


def test_waiting_answers_are_admitted_in_order_and_within_memory(engine: Callable[..., Engine], gate: Any) -> None:
    running = engine(gate, batch=8, tokens=20)
    first, large, small = (Prompt([1] * read, most, 0.0) for read, most in ((4, 6), (8, 10), (1, 1)))
    order: list[int] = []
    done: queue.Queue[int] = queue.Queue()

    def deliver(number: int, piece: Piece | Exception) -> None:
        assert isinstance(piece, Piece)
        if piece.finish is not None:
            done.put(number)

    running.submit([first, large, small], deliver)
    gate.open.set()
    order = [done.get(timeout=60) for _ in range(3)]
    assert order[0] == 0 and set(gate.sizes) <= {1, 2}, "the small one overtook, or the large one did not wait"
    assert running.admitted == 0


def test_full_queue_takes_none_of_several(engine: Callable[..., Engine], gate: Any) -> None:
    running = engine(gate, queue=2, batch=1)
    listener = Listener(running, *prompts(2, 3))
    with pytest.raises(FullError, match="requests are waiting already: try again"):
        Listener(running, *prompts(2, 3))
    assert running.admitted == 2
    with pytest.raises(ValueError, match="4 answers in one request are more than the 3 that this server takes at once"):
        running.check_room(4)
    gate.open.set()
    assert listener.whole(1).tokens <= 3


def test_answer_waiting_too_long_is_refused(engine: Callable[..., Engine], gate: Any) -> None:
    running = engine(gate, batch=1, patience=0.1)
    listener = Listener(running, *prompts(2, 3))
    while not gate.entered:
        time.sleep(0.001)
    time.sleep(0.2)
    gate.open.set()
    assert listener.whole(0).finish is not None
    with pytest.raises(LateError, match=r"the request has waited 0\.1 seconds: try again"):
        listener.piece(1)


def test_prompt_that_cannot_be_read_fails_alone(engine: Callable[..., Engine], gate: Any, greedy: Greedy) -> None:
    running, asked = engine(gate), prompts(3, 5)
    gate.broken = list(asked[1].tokens)
    gate.open.set()
    listener = Listener(running, *asked)
    with pytest.raises(FailedError, match="the request could not be computed: RuntimeError"):
        listener.piece(1)
    assert [listener.tokens(number) for number in (0, 2)] == [greedy(asked[number].tokens, 5) for number in (0, 2)]


def test_listener_that_fails_stops_its_answer_alone(engine: Callable[..., Engine], greedy: Greedy) -> None:
    running, (asked,) = engine(ends=frozenset()), prompts(1, 20)

    def deliver(number: int, piece: Piece | Exception) -> None:
        raise RuntimeError("the loop is closed")

    (lost,) = running.submit([asked], deliver)
    assert Listener(running, asked).tokens()[:5] == greedy(asked.tokens, 5)
    assert len(lost.made) == 1 and lost.gone


def test_answer_ends_at_end_token_stop_or_limit(engine: Callable[..., Engine], tokenizer: Any, greedy: Greedy) -> None:
    (asked,) = prompts(1, 12, seed=3)
    made = greedy(asked.tokens, 12)
    ended = Listener(engine(ends=frozenset({made[4]})), asked).whole()
    assert ended.finish == "stop" and ended.tokens == made.index(made[4]) + 1
    whole = Listener(engine(ends=frozenset()), asked).whole()
    assert whole.finish == "length" and whole.tokens == 12
    stop = whole.text[len(whole.text) // 2 :][:2]
    stopped = Listener(engine(ends=frozenset()), Prompt(asked.tokens, 12, 0.0, stops=(stop,))).whole()
    assert stopped.finish == "stop" and stopped.text == whole.text.partition(stop)[0] and stopped.tokens <= 12


@pytest.mark.parametrize("piece", [3, 64])
@pytest.mark.parametrize("most", [0, 2])
def test_scores_are_log_probabilities_of_prompt_and_answer(
    piece: int, most: int, engine: Callable[..., Engine], gate: Any, tiny: Any
) -> None:
    gate.piece = piece
    gate.open.set()
    (asked,) = prompts(1, most, seed=5, alternatives=2, scored=True)
    listener = Listener(engine(gate, ends=frozenset()), asked)
    scores = listener.whole().scores
    tokens = [*asked.tokens, *listener.answers[0].made]
    assert [score.token for score in scores] == tokens and len(tokens) == len(asked.tokens) + most
    with torch.no_grad():
        logprobs = tiny(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert scores[0].logprob is None and scores[0].alternatives == ()
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(logprobs[place, tokens[place + 1]]), abs=1e-4)
        assert [token for token, _ in score.alternatives] == logprobs[place].topk(2).indices.tolist()


def test_engine_closed_while_waiting_ends_its_thread(engine: Callable[..., Engine]) -> None:
    running = engine()
    running.close()
    assert not running._thread.is_alive()
