"""Audit reports made by hand: one as real data gives it, one whose rows would break a careless page, an empty one."""

from __future__ import annotations

from packhorse.data.audit_report import AuditReport, DuplicateGroup, RowAudit, SourceAudit, SplitAudit
from packhorse.data.checks.counters import Sample
from packhorse.data.checks.scorecard import ScoreCard
from packhorse.data.ledger import Entry, Ledger

START, END = "<|im_start|>", "<|im_end|>"

HOSTILE = [
    "<script>document.title = 'pwned'; document.body.dataset.pwned = 'yes'</script>",
    "</script></style></title></div></body><img src=x onerror=\"document.body.dataset.pwned='yes'\">",
    '" onmouseover="document.body.dataset.pwned=1" style="position:fixed" x="',
    "{{ 7 * 7 }}{% include '/etc/passwd' %}<!-- --><![CDATA[ ]]>&lt;b&gt;&amp;",
    "javascript:alert(1)//`${document.body.dataset.pwned=1}`",
    "\u202eكتب النص من اليمين\u202c مرحبا بالعالم שלום",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301\u0327\u0330 \U0001f468\u200d\U0001f4bb",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 12,
    "nul \x00 escape \x1b[31mred\x1b[0m bell \x07 half \ud83d separator \u2028 mark \ufeff",
]


def chat(user: str, answer: str) -> tuple[tuple[str, bool], ...]:
    """A ChatML chat of one turn in pieces."""
    return (
        (f"{START}user\n{user}{END}\n{START}assistant\n", False),
        (f"{answer}{END}", True),
        ("\n", False),
    )


def real_report() -> AuditReport:
    """Two sources as GSM8K and a labelled Spanish set are, with a few of everything."""
    ledger = Ledger(
        rows_in=Entry(rows=8_673, tokens=1_742_906),
        losses={
            "bad": Entry(rows=14),
            "duplicate": Entry(rows=40, tokens=9_310),
            "contaminated": Entry(rows=25, tokens=2_204),
            "over_long": Entry(rows=2, tokens=12_043),
        },
        kept={
            "train": Entry(rows=7_304, tokens=1_454_218),
            "validation": Entry(rows=1_288, tokens=258_131),
        },
        tokens_cut=7_000,
        truncated=3,
    )
    strata = {"en": (6_211, 1_096), "es": (1_020, 181), "de": (73, 11)}
    return AuditReport(
        name="gsm8k-and-tickets",
        tokenizer="qwen2-151k",
        template="tokenizer",
        stop_token=END,
        length_tokens=2_048,
        sources=(
            SourceAudit(
                "data/gsm8k_train.jsonl",
                "question_answer",
                7_473,
                "train",
                {"used": {"question": 7_473, "answer": 7_473}, "kept": {}, "ignored": {}},
            ),
            SourceAudit(
                "data/tickets_es.csv",
                "text_label",
                1_186,
                "train",
                {"used": {"text (body)": 1_186, "label": 1_186}, "kept": {"id": 1_180}, "ignored": {"notes": 40}},
            ),
        ),
        ledger=ledger,
        splits={
            "train": SplitAudit(7_304, 1_454_218, 711, 0.9987, {name: num for name, (num, _) in strata.items()}),
            "validation": SplitAudit(1_288, 258_131, 127, 0.9925, {name: num for name, (_, num) in strata.items()}),
        },
        shares=(0.85, 0.15, 0.0),
        shares_reason="8,592 rows, fewer than 50,000: no test set, so that more is trained on",
        length_percentiles={0: 12, 50: 187, 90: 318, 99: 512, 100: 11_592},
        length_histogram=(
            (16, 11),
            (23, 64),
            (32, 210),
            (45, 402),
            (64, 498),
            (91, 611),
            (128, 1_188),
            (181, 2_390),
            (256, 1_905),
            (362, 984),
            (512, 310),
            (724, 61),
            (1_024, 14),
            (1_448, 5),
            (2_048, 1),
            (2_896, 0),
            (4_096, 3),
            (5_793, 0),
            (8_192, 0),
            (11_592, 2),
        ),
        num_tokens=1_742_906,
        supervised_share=0.5713,
        cards=(
            ScoreCard(
                source="data/gsm8k_train.jsonl",
                num_rows=7_473,
                languages={"en": 7_461, "es": 9, "fr": 3},
                labels={},
                exact_duplicates=0,
                near_duplicates=6,
                contradictions=2,
                short_answers=0,
                length_outliers=58,
                personal={"email": 1, "phone": 4},
                broken_encoding=7,
                samples={
                    "near_duplicates": (
                        Sample("data/gsm8k_train.jsonl:812", "Ken created a care package to send to his brother, who"),
                    ),
                    "personal:email": (
                        Sample("data/gsm8k_train.jsonl:4410", "Write to ‹email› before the 3rd of May, she said."),
                    ),
                    "broken_encoding": (
                        Sample("data/gsm8k_train.jsonl:97", "JosÃ© bought 3 kilos of jalapeÃ±os and paid $12."),
                        Sample("data/gsm8k_train.jsonl:5531", "The cafÃ© sold twice as many cups on Sunday."),
                    ),
                },
            ),
            ScoreCard(
                source="data/tickets_es.csv",
                num_rows=1_186,
                languages={"es": 1_102, "en": 84},
                labels={f"{name}_{number}": 60 - 2 * number for name in ("card", "transfer") for number in range(12)},
                exact_duplicates=35,
                near_duplicates=12,
                contradictions=5,
                short_answers=0,
                length_outliers=0,
                personal={"email": 12},
                broken_encoding=0,
                samples={"exact_duplicates": (Sample("data/tickets_es.csv:77", "¿Dónde está mi tarjeta nueva?"),)},
            ),
        ),
        duplicates=(
            DuplicateGroup(
                tuple(
                    f"data/tickets_es.csv:{line}" for line in (14, 77, 129, 340, 341, 502, 618, 777, 801, 930, 1_101)
                ),
                "¿Dónde está mi tarjeta nueva? La pedí hace tres semanas y todavía no ha llegado.",
                equal=True,
                num_rows=11,
            ),
            DuplicateGroup(
                ("data/gsm8k_train.jsonl:812", "data/gsm8k_train.jsonl:6040"),
                "Ken created a care package to send to his brother, who was away at boarding school.",
                equal=False,
                num_rows=2,
            ),
        ),
        num_contaminated=25,
        contaminated=tuple(f"data/gsm8k_train.jsonl:{line}" for line in range(40, 840, 32)),
        notes=(
            "stratum de has 84 rows: its shares cannot be kept within 1 % of those that were asked for.",
            "rows of a median of 187 tokens pack well at T 2,048: 99.87 % of the room is used.",
        ),
        rows=(
            RowAudit(
                "data/gsm8k_train.jsonl:1",
                "train",
                chat(
                    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
                    "How many clips did Natalia sell altogether in April and May?",
                    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
                    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
                ),
            ),
            RowAudit(
                "data/tickets_es.csv:2", "validation", chat("¿Por qué me han cobrado dos veces en la tienda?", "card_3")
            ),
        ),
    )


def hostile_report() -> AuditReport:
    """Every text that a user can bring says something hostile; 77 labels; no validation rows."""
    all_at_once = " ".join(HOSTILE)
    kept = Entry(rows=999_999_000, tokens=123_456_789_012)
    return AuditReport(
        name="hostile",
        tokenizer=HOSTILE[0],
        template=HOSTILE[1],
        stop_token="</s>",
        length_tokens=131_072,
        sources=(
            SourceAudit(
                HOSTILE[2],
                "messages",
                1_000_000_000,
                "train",
                {"used": {"messages": 1}, "kept": dict.fromkeys(HOSTILE, 1), "ignored": {}},
            ),
        ),
        ledger=Ledger(
            rows_in=Entry(rows=1_000_000_000, tokens=123_456_789_999),
            losses={"bad": Entry(rows=1), "masked_out": Entry(rows=999, tokens=987)},
            kept={"train": kept},
        ),
        splits={
            "train": SplitAudit(kept.rows, kept.tokens, 941_902, 0.99999, dict.fromkeys(HOSTILE, 111111000)),
            "validation": SplitAudit(0, 0, 0, 0.0, {}),
        },
        shares=(0.7, 0.15, 0.15),
        shares_reason=HOSTILE[3],
        length_percentiles={0: 1, 50: 100, 90: 200, 99: 300, 100: 2_000},
        length_histogram=((2_000, 1_000_000_000),),
        num_tokens=123_456_789_999,
        supervised_share=1.0,
        cards=(
            ScoreCard(
                source=HOSTILE[2],
                num_rows=1_000_000_000,
                languages=dict.fromkeys(HOSTILE, 1),
                labels={f"{HOSTILE[number % len(HOSTILE)]} {number}": 77 - number for number in range(77)},
                exact_duplicates=1,
                near_duplicates=0,
                contradictions=0,
                short_answers=0,
                length_outliers=0,
                personal={HOSTILE[0]: 1},
                broken_encoding=1,
                samples={
                    name: tuple(Sample(text, text) for text in HOSTILE)
                    for name in ("exact_duplicates", "broken_encoding", f"personal:{HOSTILE[0]}")
                },
            ),
        ),
        duplicates=(DuplicateGroup(tuple(HOSTILE) * 100, all_at_once * 40, equal=True, num_rows=1_000_000),),
        num_contaminated=len(HOSTILE),
        contaminated=tuple(HOSTILE),
        notes=tuple(HOSTILE),
        rows=(
            RowAudit(HOSTILE[0], "train", tuple((text, at % 2 == 1) for at, text in enumerate(HOSTILE))),
            RowAudit("long.jsonl:1", "train", chat("x" * 2_000, "a long answer " * 2_000)),
        ),
    )


def empty_report() -> AuditReport:
    """No row was kept and nothing was found."""
    return AuditReport(
        name="empty",
        tokenizer="t",
        template="chatml",
        stop_token=END,
        length_tokens=8,
        sources=(),
        ledger=Ledger(rows_in=Entry(), losses={}, kept={}),
        splits={},
        shares=(1.0, 0.0, 0.0),
        shares_reason="",
        length_percentiles={},
        length_histogram=(),
        num_tokens=0,
        supervised_share=0.0,
        cards=(),
        duplicates=(),
        num_contaminated=0,
        contaminated=(),
        notes=(),
        rows=(),
    )
