"""Metrics of made texts against references: exact match, ROUGE (rouge-score), BLEU and chrF (sacrebleu)."""

from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError

PACKAGES = ("rouge_score", "sacrebleu")
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def refuse_missing_packages() -> None:
    """Raises ConfigError where the packages of `text_scores` are not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"evaluation.generate_rows: ROUGE, BLEU and chrF need {' and '.join(missing)}, not installed here.",
            "pip install 'peft-engine[generation]', or set evaluation.generate_rows: 0 (loss and accuracy need none).",
        )


def text_scores(found: list[str], wanted: list[str]) -> dict[str, Any]:
    """Scores of texts against one reference each.

    Returns:
        exact_match (both stripped of outer white space) and rouge1, rouge2, rouge_l (mean F1, no stemming) from 0 to
        1; bleu and chrf of the whole corpus from 0 to 100, as sacrebleu reports them; generated_rows.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found, wanted = [text.strip() for text in found], [text.strip() for text in wanted]
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    each = [scorer.score(reference, text) for text, reference in zip(found, wanted, strict=True)]
    rouge = {name: sum(one[key].fmeasure for one in each) / len(each) for key, name in ROUGE.items()}
    return {
        "exact_match": sum(a == b for a, b in zip(found, wanted, strict=True)) / len(found),
        **rouge,
        "bleu": sacrebleu.corpus_bleu(found, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(found, [wanted]).score,
        "generated_rows": len(found),
    }
