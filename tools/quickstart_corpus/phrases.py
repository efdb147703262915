"""Task families about wording: sentiment, plurals, capitals, refusals."""

from __future__ import annotations

from typing import Final, Literal

from quickstart_corpus.rows import Both, Dice, Language, Task, upper_first

Gender = Literal["m", "f"]

# Spanish: the adjective as (masculine, feminine); English has one form.
SUBJECTS_ES: Final[tuple[tuple[str, Gender], ...]] = (
    ("la comida", "f"),
    ("el servicio", "m"),
    ("la habitación", "f"),
    ("el trato", "m"),
    ("la entrega", "f"),
    ("el producto", "m"),
    ("la pantalla", "f"),
    ("el sonido", "m"),
    ("la película", "f"),
    ("el precio", "m"),
    ("la aplicación", "f"),
    ("el hotel", "m"),
)
SUBJECTS_EN: Final = (
    "the food",
    "the service",
    "the room",
    "the staff",
    "the delivery",
    "the product",
    "the screen",
    "the sound",
    "the film",
    "the price",
    "the app",
    "the hotel",
)
GOOD_ES: Final = (
    ("magnífico", "magnífica"),
    ("estupendo", "estupenda"),
    ("excelente", "excelente"),
    ("maravilloso", "maravillosa"),
    ("perfecto", "perfecta"),
    ("fantástico", "fantástica"),
    ("muy bueno", "muy buena"),
    ("genial", "genial"),
)
BAD_ES: Final = (
    ("horrible", "horrible"),
    ("pésimo", "pésima"),
    ("decepcionante", "decepcionante"),
    ("muy malo", "muy mala"),
    ("espantoso", "espantosa"),
    ("lamentable", "lamentable"),
    ("desastroso", "desastrosa"),
    ("mediocre", "mediocre"),
)
GOOD_EN: Final = ("great", "excellent", "wonderful", "perfect", "fantastic", "very good", "superb", "lovely")
BAD_EN: Final = ("horrible", "awful", "disappointing", "very bad", "terrible", "poor", "dreadful", "mediocre")
REVIEWS: Final = Both(
    ("Clasifica la opinión.", "¿Qué sentimiento expresa la reseña?", "Di el tono de esta opinión."),
    ("Classify the review.", "What sentiment does the review express?", "State the tone of this review."),
)
LABELS: Final = Both(("negativa", "mixta", "positiva"), ("negative", "mixed", "positive"))
JOINED: Final = Both(("y", "pero"), ("and", "but"))


def spanish_clause(good: bool, subject: tuple[str, Gender], dice: Dice) -> str:
    """Say that a thing was good or bad, the adjective agreeing with it."""
    words, gender = subject
    masculine, feminine = dice.pick(GOOD_ES if good else BAD_ES)
    return f"{words} fue {masculine if gender == 'm' else feminine}"


def english_clause(good: bool, subject: str, dice: Dice) -> str:
    """Say that a thing was good or bad."""
    return f"{subject} was {dice.pick(GOOD_EN if good else BAD_EN)}"


def draw_sentiment(language: Language, dice: Dice) -> Task:
    """Name the tone of a review made of two clauses."""
    first, second = dice.pick(((True, True), (False, False), (True, False), (False, True)))
    if language == "es":
        one, two = dice.shuffled(SUBJECTS_ES)[:2]
        clauses = spanish_clause(first, one, dice), spanish_clause(second, two, dice)
    else:
        this, that = dice.shuffled(SUBJECTS_EN)[:2]
        clauses = english_clause(first, this, dice), english_clause(second, that, dice)
    joint = JOINED[language][first != second]
    review = f"{clauses[0].capitalize()} {joint} {clauses[1]}."
    return Task(dice.pick(REVIEWS[language]), review, LABELS[language][first + second])


# Noun as (singular, plural, gender); adjective as (m. sing., f. sing., m. plural, f. plural).
NOUNS_ES: Final[tuple[tuple[str, str, Gender], ...]] = (
    ("casa", "casas", "f"),
    ("libro", "libros", "m"),
    ("flor", "flores", "f"),
    ("coche", "coches", "m"),
    ("mesa", "mesas", "f"),
    ("árbol", "árboles", "m"),
    ("ciudad", "ciudades", "f"),
    ("lápiz", "lápices", "m"),
    ("silla", "sillas", "f"),
    ("reloj", "relojes", "m"),
    ("canción", "canciones", "f"),
    ("jardín", "jardines", "m"),
    ("puerta", "puertas", "f"),
    ("papel", "papeles", "m"),
    ("luz", "luces", "f"),
    ("barco", "barcos", "m"),
    ("camisa", "camisas", "f"),
    ("tren", "trenes", "m"),
    ("pared", "paredes", "f"),
    ("pez", "peces", "m"),
)
ADJECTIVES_ES: Final = (
    ("rojo", "roja", "rojos", "rojas"),
    ("blanco", "blanca", "blancos", "blancas"),
    ("negro", "negra", "negros", "negras"),
    ("azul", "azul", "azules", "azules"),
    ("verde", "verde", "verdes", "verdes"),
    ("gris", "gris", "grises", "grises"),
    ("pequeño", "pequeña", "pequeños", "pequeñas"),
    ("viejo", "vieja", "viejos", "viejas"),
    ("nuevo", "nueva", "nuevos", "nuevas"),
    ("bonito", "bonita", "bonitos", "bonitas"),
)
NOUNS_EN: Final = (
    ("house", "houses"),
    ("book", "books"),
    ("flower", "flowers"),
    ("car", "cars"),
    ("table", "tables"),
    ("tree", "trees"),
    ("city", "cities"),
    ("pencil", "pencils"),
    ("chair", "chairs"),
    ("watch", "watches"),
    ("song", "songs"),
    ("garden", "gardens"),
    ("door", "doors"),
    ("box", "boxes"),
    ("light", "lights"),
    ("ship", "ships"),
    ("shirt", "shirts"),
    ("train", "trains"),
    ("knife", "knives"),
    ("mouse", "mice"),
)
ADJECTIVES_EN: Final = ("red", "white", "black", "blue", "green", "grey", "small", "old", "new", "pretty")
TO_PLURAL: Final = Both(
    ("Pon en plural.", "Escribe el plural.", "Pasa la expresión al plural.", "¿Cuál es el plural?"),
    ("Put this in the plural.", "Write the plural.", "Make the phrase plural.", "What is the plural?"),
)


def draw_phrase(language: Language, dice: Dice) -> tuple[str, str]:
    """Return a noun phrase with article and adjective, in the singular and in the plural."""
    if language == "es":
        one, many, gender = dice.pick(NOUNS_ES)
        masculine, feminine, masculines, feminines = dice.pick(ADJECTIVES_ES)
        if gender == "m":
            return f"el {one} {masculine}", f"los {many} {masculines}"
        return f"la {one} {feminine}", f"las {many} {feminines}"
    adjective, (singular, plural) = dice.pick(ADJECTIVES_EN), dice.pick(NOUNS_EN)
    return f"the {adjective} {singular}", f"the {adjective} {plural}"


def draw_plural(language: Language, dice: Dice) -> Task:
    """Put a noun phrase in the plural, with agreement."""
    singular, plural = draw_phrase(language, dice)
    return Task(dice.pick(TO_PLURAL[language]), singular, plural)


REFUSAL_OPENINGS: Final = Both(
    (
        "",
        "Hola. ",
        "Por favor, dime: ",
        "Una duda: ",
        "Necesito ayuda. ",
        "Rápido: ",
        "Oye: ",
        "Buenas. ",
        "Quiero saber algo. ",
        "A ver: ",
    ),
    (
        "",
        "Hello. ",
        "Please tell me: ",
        "One question: ",
        "I need help. ",
        "Quickly: ",
        "Hey: ",
        "Hi there. ",
        "I want to know something. ",
        "So: ",
    ),
)
TROUBLES: Final = Both(
    ("la tos", "la fiebre", "los mareos", "el insomnio", "la migraña", "el dolor de espalda"),
    ("a cough", "a fever", "dizziness", "insomnia", "a headache", "back pain"),
)
DISPUTES: Final = Both(
    ("mi casero", "mi vecino", "mi jefe", "mi banco", "mi seguro", "mi socio"),
    ("my landlord", "my neighbour", "my boss", "my bank", "my insurer", "my partner"),
)
ASSETS: Final = Both(
    ("oro", "plata", "bitcoin", "acciones", "bonos", "dólares"),
    ("gold", "silver", "bitcoin", "shares", "bonds", "dollars"),
)
PLACES: Final = Both(
    ("Sevilla", "Granada", "Bilbao", "Lima", "Quito", "Londres"),
    ("London", "Leeds", "Boston", "Denver", "Dublin", "Sydney"),
)
OUT_OF_SCOPE: Final = Both(
    (
        (TROUBLES.es, ("¿qué tomo para {}?", "¿qué medicina va bien para {}?"), "Lo siento, no doy consejos médicos."),
        (DISPUTES.es, ("¿puedo demandar a {}?", "¿gano un juicio contra {}?"), "Lo siento, no doy consejos legales."),
        (ASSETS.es, ("¿invierto en {}?", "¿compro {} este año?"), "Lo siento, no doy consejos de inversión."),
        (PLACES.es, ("¿lloverá mañana en {}?", "¿qué tiempo hará en {}?"), "Lo siento, no puedo predecir el tiempo."),
        (
            PLACES.es,
            ("¿me reservas un hotel en {}?", "¿me compras un vuelo a {}?"),
            "Lo siento, no puedo hacer reservas.",
        ),
    ),
    (
        (
            TROUBLES.en,
            ("what should I take for {}?", "which medicine is good for {}?"),
            "Sorry, I do not give medical advice.",
        ),
        (DISPUTES.en, ("can I sue {}?", "would I win in court against {}?"), "Sorry, I do not give legal advice."),
        (ASSETS.en, ("should I invest in {}?", "shall I buy {} this year?"), "Sorry, I do not give investment advice."),
        (
            PLACES.en,
            ("will it rain tomorrow in {}?", "what will the weather be in {}?"),
            "Sorry, I cannot predict the weather.",
        ),
        (
            PLACES.en,
            ("can you book me a hotel in {}?", "can you buy me a flight to {}?"),
            "Sorry, I cannot make bookings.",
        ),
    ),
)


def draw_refusal(language: Language, dice: Dice) -> Task:
    """Decline, in the row's language, what this assistant is not made for."""
    things, questions, answer = dice.pick(OUT_OF_SCOPE[language])
    opening = dice.pick(REFUSAL_OPENINGS[language])
    question = dice.pick(questions).format(dice.pick(things))
    asked = f"{opening}{question}" if opening.endswith(": ") else f"{opening}{upper_first(question)}"
    return Task(asked, "", answer)


PLATES: Final = Both(
    ("ventas", "compras", "archivo", "taller", "oficina", "caja", "correo", "soporte", "turnos", "salida"),
    ("billing", "shipping", "access", "returns", "tech", "sales", "office", "archive", "desk", "exit", "lobby", "mail"),
)
TO_CAPITALS: Final = Both(
    ("Escribe la etiqueta en mayúsculas.", "Pasa el rótulo a mayúsculas.", "Ponlo en mayúsculas."),
    ("Write the label in capitals.", "Put the sign in capitals.", "Make it upper case."),
)


def draw_capitals(language: Language, dice: Dice) -> Task:
    """Write a door plate in capitals: a place, a letter and a digit."""
    place = dice.pick(PLATES[language])
    plate = f"{place}/{dice.pick('abcp')}{dice.between(1, 9)}"
    return Task(dice.pick(TO_CAPITALS[language]), plate, plate.upper())
