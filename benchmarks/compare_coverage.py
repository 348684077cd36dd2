"""How often the intervals of `cheaptrain compare` hold the truth: `python benchmarks/compare_coverage.py`.

Two recipes that are equally good are trained with the same three seeds and asked the same questions, in a simulation:
each answer is right with a chance that depends on the question, on the seed, on the run, and on how the question suits
the recipe. The true difference is 0, so a 95 % interval should hold 0 in 95 of 100 repetitions. Beside the interval
of `compare` stand the two that are found elsewhere: seeds and questions drawn anew together, and the questions alone,
of the runs' mean answers.
"""

import numpy as np
from results import report

from cheaptrain.compare.statistics import Block, between_paired_seeds, between_questions

SEEDS, REPETITIONS, DRAWS = 3, 400, 400
SUITS = 0.3  # standard deviation of how a question suits a recipe; the answer's own chance has 1
CASES = [(200, 0.1), (200, 0.3), (1000, 0.1), (1000, 0.3)]  # questions, spread between runs


def answers(rng: np.random.Generator, questions: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers [seeds, questions] of both recipes; half of the spread is the seed's, alike in both."""
    easy, suits = rng.normal(size=questions), SUITS * rng.normal(size=questions)
    of_seed = spread * rng.normal(size=(SEEDS, 1))
    sides = []
    for recipe in (easy, easy + suits):
        of_run = spread * rng.normal(size=(SEEDS, 1))
        sides.append((recipe + of_seed + of_run + rng.normal(size=(SEEDS, questions)) > 0).astype(float))
    return sides[0], sides[1]


def drawn_together(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Seeds and questions drawn anew, both with replacement; `differences` [seeds, questions]."""
    seeds, questions = differences.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    of_questions = rng.multinomial(questions, np.full(questions, 1 / questions), size=DRAWS)
    means = ((of_seeds @ differences) * of_questions).sum(axis=1) / (seeds * questions)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    rng, rows, data = np.random.default_rng(1), [], []
    for questions, spread in CASES:
        held, widths, accuracies = np.zeros(3), np.zeros(3), []
        for _ in range(REPETITIONS):
            first, second = answers(rng, questions, spread)
            block = Block(first, second)
            accuracies.append(first[0].mean())
            estimates = between_paired_seeds([block]), between_questions([block])
            ends = [(one.low, one.high) for one in estimates]
            ends.insert(1, drawn_together(second - first, rng))
            held += [low <= 0 <= high for low, high in ends]
            widths += [(high - low) / 2 for low, high in ends]
        points = 100 * float(np.sqrt(max(0.0, np.var(accuracies) - 0.25 / questions)))
        shares, halves = held / REPETITIONS, 100 * widths / REPETITIONS
        cells = (f"{share:.1%}, ±{half:.1f}" for share, half in zip(shares, halves, strict=True))
        rows.append([f"{questions:,}", f"{points:.1f}", *cells])
        data.append({"questions": questions, "spread": spread, "held": shares.tolist(), "half_widths": halves.tolist()})
    report(
        "compare_coverage",
        title=f"How many of {REPETITIONS} 95 % intervals hold the true difference of equal recipes, and half their "
        f"mean width in points; {SEEDS} paired seeds, accuracy near 50 %",
        header=[
            "questions",
            "spread of runs, points",
            "cheaptrain compare",
            "seeds and questions drawn",
            "questions alone",
        ],
        rows=rows,
        data={"cases": data},
    )


if __name__ == "__main__":
    main()
