"""The held-out family: route a support ticket to `TEAM/PRIORITY`, as in `BILLING/P2`.

No row of the core corpus asks for it, so only a fine-tuned model can do it.
"""

from __future__ import annotations

from typing import Final

from packhorse.quickstart.rows import Both, Dice, Language, Task

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
            "me habéis cobrado dos veces",
            "la factura tiene un importe equivocado",
            "falta el IVA en la factura",
            "el cargo de la tarjeta no es correcto",
            "no me llegó la factura de este mes",
        ),
        (
            "el paquete no ha llegado",
            "el envío lleva días parado",
            "el repartidor dejó el paquete en otra calle",
            "el seguimiento del envío no avanza",
            "quiero cambiar la dirección de entrega",
        ),
        (
            "no puedo entrar en mi cuenta",
            "olvidé la contraseña",
            "mi usuario está bloqueado",
            "no recibo el código para iniciar sesión",
            "la cuenta no acepta mi contraseña",
        ),
        (
            "quiero devolver el pedido",
            "la talla no es la mía y pido un cambio",
            "necesito una etiqueta de devolución",
            "el artículo llegó roto y lo devuelvo",
            "quiero devolver un regalo",
        ),
        (
            "la aplicación se cierra sola",
            "la pantalla se queda en negro",
            "la página da un error al guardar",
            "la aplicación va muy lenta",
            "el botón de guardar no funciona",
        ),
        (
            "quiero un presupuesto para mi empresa",
            "pregunto por el precio del plan anual",
            "busco un descuento para estudiantes",
            "me interesa comprar diez licencias",
            "quiero contratar el plan superior",
        ),
    ),
    (
        (
            "I was charged twice",
            "the invoice shows the wrong amount",
            "the invoice does not show the VAT",
            "the charge on my card is not correct",
            "this month's invoice did not reach me",
        ),
        (
            "the parcel has not arrived",
            "the shipment has been stuck for days",
            "the courier left the parcel in another street",
            "the shipment tracking does not move",
            "I want to change the delivery address",
        ),
        (
            "I cannot log in to my account",
            "I forgot my password",
            "my user is locked",
            "I do not get the code to log in",
            "the account does not accept my password",
        ),
        (
            "I want to return the order",
            "the size is wrong and I ask for an exchange",
            "I need a return label",
            "the item arrived broken and I am returning it",
            "I want to return a gift",
        ),
        (
            "the app closes by itself",
            "the screen goes black",
            "the page gives an error on saving",
            "the app is very slow",
            "the save button does not work",
        ),
        (
            "I want a quote for my company",
            "I am asking for the price of the yearly plan",
            "I am looking for a student discount",
            "I would like to buy ten licences",
            "I want to move to the higher plan",
        ),
    ),
)
# One group per priority, in the order of PRIORITIES.
URGENCIES: Final = Both(
    (
        (
            "Es urgente.",
            "Lo necesito hoy mismo.",
            "Estamos parados por esto.",
            "No puede esperar.",
            "Responded cuanto antes.",
        ),
        (
            "Esperaba verlo resuelto esta semana.",
            "A ver si puede ser en unos días.",
            "Me gustaría tenerlo pronto.",
            "Contestad esta semana, por favor.",
            "Sería bueno tenerlo en unos días.",
        ),
        (
            "No hay prisa.",
            "Cuando podáis.",
            "No corre prisa.",
            "Puede esperar al mes que viene.",
            "Sin prisa, gracias.",
        ),
    ),
    (
        (
            "It is urgent.",
            "I need it today.",
            "We are blocked by this.",
            "It cannot wait.",
            "Answer as soon as possible.",
        ),
        (
            "I hoped to see it solved this week.",
            "Perhaps in a few days.",
            "I would like it soon.",
            "Please answer this week.",
            "It would be good to have it in a few days.",
        ),
        (
            "There is no hurry.",
            "Whenever you can.",
            "No rush at all.",
            "It can wait until next month.",
            "No hurry, thank you.",
        ),
    ),
)
OPENINGS: Final = Both(
    ("", "Hola. ", "Buenos días. ", "Buenas tardes. "), ("", "Hello. ", "Good morning. ", "Good afternoon. ")
)


def draw_ticket(language: Language, dice: Dice) -> Task:
    """Route one ticket by its problem and by how soon an answer is wanted."""
    team, priority = dice.below(len(TEAMS)), dice.below(len(PRIORITIES))
    problem = dice.pick(PROBLEMS[language][team])
    urgency = dice.pick(URGENCIES[language][priority])
    first, second = (f"{problem}.", urgency) if dice.below(3) else (urgency, f"{problem}.")
    text = f"{dice.pick(OPENINGS[language])}{upper_first(first)} {upper_first(second)}"
    return Task(dice.pick(INSTRUCTIONS[language]), text, f"{TEAMS[team]}/{PRIORITIES[priority]}")


def upper_first(sentence: str) -> str:
    """Capitalise the first letter."""
    return sentence[0].upper() + sentence[1:]
