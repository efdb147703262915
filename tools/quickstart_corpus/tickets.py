"""Customers' messages: the held-out family `tickets` routes them to `TEAM/PRIORITY`, as in `BILLING/P2`.

No row of the core corpus asks for a code, so only a fine-tuned model can do it. The core does read such
messages (`inbox`), because an adapter cannot teach a frozen embedding words that it never met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quickstart_corpus.rows import Both, Dice, Language, Task, upper_first

TEAMS: Final = ("BILLING", "SHIPPING", "ACCESS", "RETURNS", "TECH", "SALES")
PRIORITIES: Final = ("P1", "P2", "P3")
INSTRUCTIONS: Final = Both(
    ("Asigna el ticket.", "Dirige este ticket.", "¿A qué cola va el ticket?"),
    ("Route the ticket.", "Triage this ticket.", "Which queue gets this ticket?"),
)
# One group per team, in the order of TEAMS.
PROBLEMS: Final = Both(
    (
        (
            "me habéis cobrado dos veces la factura",
            "la factura tiene un importe equivocado",
            "falta el IVA en la factura",
            "no me llegó la factura de este mes",
        ),
        (
            "el paquete no ha llegado",
            "el envío lleva días parado",
            "el repartidor dejó el paquete en otra calle",
            "el seguimiento del envío no avanza",
        ),
        (
            "no puedo entrar en mi cuenta",
            "olvidé la contraseña",
            "mi cuenta está bloqueada",
            "la cuenta no acepta mi contraseña",
        ),
        (
            "quiero devolver el pedido",
            "necesito una etiqueta de devolución",
            "el artículo llegó roto y lo quiero devolver",
            "la devolución no aparece en mi perfil",
        ),
        (
            "la aplicación se cierra sola",
            "la aplicación va muy lenta",
            "la página da un error al guardar",
            "sale un error al abrir la aplicación",
        ),
        (
            "quiero un presupuesto para mi empresa",
            "pregunto por el precio del plan anual",
            "busco un descuento para estudiantes",
            "pido precio para diez licencias",
        ),
    ),
    (
        (
            "I was charged twice on one invoice",
            "the invoice shows the wrong amount",
            "the invoice does not show the VAT",
            "this month's invoice did not reach me",
        ),
        (
            "the parcel has not arrived",
            "the shipment has been stuck for days",
            "the courier left the parcel in another street",
            "the shipment tracking does not move",
        ),
        (
            "I cannot log in to my account",
            "I forgot my password",
            "my account is locked",
            "the account does not accept my password",
        ),
        (
            "I want to return the order",
            "I need a return label",
            "the item arrived broken and I want to return it",
            "my return does not show in my profile",
        ),
        (
            "the app closes by itself",
            "the app is very slow",
            "the page gives an error on saving",
            "I get an error when I open the app",
        ),
        (
            "I want a quote for my company",
            "I am asking for the price of the yearly plan",
            "I am looking for a student discount",
            "I ask for a price for ten licences",
        ),
    ),
)
# One group per priority, in the order of PRIORITIES.
URGENCIES: Final = Both(
    (
        ("Es urgente.", "Lo necesito hoy mismo.", "Es muy urgente, estamos parados.", "Responded hoy, por favor."),
        (
            "Espero verlo resuelto esta semana.",
            "A ver si puede ser en unos días.",
            "Contestad esta semana, por favor.",
            "Sería bueno tenerlo en unos días.",
        ),
        ("No hay prisa.", "Puede esperar.", "No corre prisa.", "Puede esperar al mes que viene."),
    ),
    (
        ("It is urgent.", "I need it today.", "It is very urgent, we are blocked.", "Please answer today."),
        (
            "I hope to see it solved this week.",
            "Perhaps in a few days.",
            "Please answer this week.",
            "It would be good to have it in a few days.",
        ),
        ("There is no hurry.", "It can wait.", "No hurry at all.", "It can wait until next month."),
    ),
)
OPENINGS: Final = Both(
    ("", "Hola. ", "Buenos días. ", "Buenas tardes. "), ("", "Hello. ", "Good morning. ", "Good afternoon. ")
)


TOPIC_QUESTIONS: Final = Both(
    ("¿De qué trata el mensaje?", "Di el tema del mensaje."),
    ("What is the message about?", "Name the topic of the message."),
)
TOPICS: Final = Both(
    ("facturas", "envíos", "acceso", "devoluciones", "fallos", "ventas"),
    ("invoices", "deliveries", "access", "returns", "faults", "sales"),
)
DEADLINE_QUESTIONS: Final = Both(
    ("¿Para cuándo pide respuesta el mensaje?", "Di el plazo que pide el mensaje."),
    ("When does the message want an answer?", "Name the deadline of the message."),
)
DEADLINES: Final = Both(("hoy", "esta semana", "sin prisa"), ("today", "this week", "no hurry"))


@dataclass(frozen=True)
class Message:
    """A customer's message; `team` and `priority` count from 0 in TEAMS and PRIORITIES."""

    text: str
    team: int
    priority: int


def draw_message(language: Language, dice: Dice) -> Message:
    """Write a problem and how soon an answer is wanted, in either order."""
    team, priority = dice.below(len(TEAMS)), dice.below(len(PRIORITIES))
    problem = dice.pick(PROBLEMS[language][team])
    urgency = dice.pick(URGENCIES[language][priority])
    first, second = (f"{problem}.", urgency) if dice.below(3) else (urgency, f"{problem}.")
    text = f"{dice.pick(OPENINGS[language])}{upper_first(first)} {upper_first(second)}"
    return Message(text, team, priority)


def draw_ticket(language: Language, dice: Dice) -> Task:
    """Route one ticket by its problem and by how soon an answer is wanted."""
    message = draw_message(language, dice)
    code = f"{TEAMS[message.team]}/{PRIORITIES[message.priority]}"
    return Task(dice.pick(INSTRUCTIONS[language]), message.text, code)


def draw_inbox(language: Language, dice: Dice) -> Task:
    """Name the topic or the deadline of a message; the core's own, easier question about such texts."""
    message = draw_message(language, dice)
    if dice.below(2):
        return Task(dice.pick(TOPIC_QUESTIONS[language]), message.text, TOPICS[language][message.team])
    answer = DEADLINES[language][message.priority]
    return Task(dice.pick(DEADLINE_QUESTIONS[language]), message.text, answer)
