"""Task families about numbers, dates and facts: units, dates, sorting, greetings, extraction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from quickstart_corpus.rows import Both, Dice, Language, Task


@dataclass(frozen=True)
class Unit:
    """A conversion: `many` source units are `factor` times as many target units."""

    factor: int
    most: int
    source: Both[str]
    target: Both[str]
    scene: Both[str]


UNITS: Final = (
    Unit(1000, 99, Both("kilómetros", "kilometres"), Both("metros", "metres"), Both("La ruta mide", "The trail is")),
    Unit(100, 99, Both("metros", "metres"), Both("centímetros", "centimetres"), Both("La cuerda mide", "The rope is")),
    Unit(1000, 99, Both("kilos", "kilograms"), Both("gramos", "grams"), Both("El paquete pesa", "The parcel weighs")),
    Unit(
        1000,
        99,
        Both("litros", "litres"),
        Both("mililitros", "millilitres"),
        Both("En el depósito caben", "The tank holds"),
    ),
    Unit(60, 10, Both("horas", "hours"), Both("minutos", "minutes"), Both("El viaje dura", "The journey takes")),
    Unit(7, 10, Both("semanas", "weeks"), Both("días", "days"), Both("El curso dura", "The course lasts")),
)
UNIT_QUESTIONS: Final = Both(
    (
        "¿Cuántos {target} son {many} {source}?",
        "¿Cuántos {target} hay en {many} {source}?",
        "Convierte {many} {source} a {target}.",
        "Expresa {many} {source} en {target}.",
        "Pasa {many} {source} a {target}.",
        "{scene} {many} {source}. ¿Cuántos {target} son?",
        "{scene} {many} {source}. Dilo en {target}.",
    ),
    (
        "How many {target} are {many} {source}?",
        "How many {target} are there in {many} {source}?",
        "Convert {many} {source} to {target}.",
        "Express {many} {source} in {target}.",
        "What is {many} {source} in {target}?",
        "{scene} {many} {source}. How many {target} is that?",
        "{scene} {many} {source}. Say it in {target}.",
    ),
)


def draw_units(language: Language, dice: Dice) -> Task:
    """Convert a whole number of one unit to a smaller one."""
    unit = dice.pick(UNITS)
    # Numbers of one digit are few among those up to 99, but have as many zeros to learn.
    many = dice.between(2, 9 if dice.below(3) == 0 else unit.most)
    target = unit.target[language]
    question = dice.pick(UNIT_QUESTIONS[language]).format(
        many=many, source=unit.source[language], target=target, scene=unit.scene[language]
    )
    return Task(question, "", f"{many * unit.factor} {target}")


MONTHS: Final = Both(
    (
        "enero",
        "febrero",
        "marzo",
        "abril",
        "mayo",
        "junio",
        "julio",
        "agosto",
        "septiembre",
        "octubre",
        "noviembre",
        "diciembre",
    ),
    (
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ),
)
MONTH_DAYS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WRITTEN_DATE: Final = Both("{day} de {month} de {year}", "{month} {day}, {year}")
TO_ISO: Final = Both(
    (
        "Escribe la fecha en formato ISO.",
        "Pasa esta fecha a AAAA-MM-DD.",
        "¿Cómo se escribe esta fecha en formato ISO?",
    ),
    ("Write the date in ISO format.", "Turn this date into YYYY-MM-DD.", "How is this date written in ISO format?"),
)
FROM_ISO: Final = Both(
    ("Escribe la fecha como día/mes/año.", "Pasa esta fecha a DD/MM/AAAA."),
    ("Write the date as day/month/year.", "Turn this date into DD/MM/YYYY."),
)


def draw_dates(language: Language, dice: Dice) -> Task:
    """Rewrite a date: in words to ISO 8601, or ISO 8601 to day/month/year."""
    year, month = dice.between(1980, 2029), dice.between(1, 12)
    day = dice.between(1, MONTH_DAYS[month - 1])
    iso = f"{year}-{month:02}-{day:02}"
    if dice.below(3) == 0:
        return Task(dice.pick(FROM_ISO[language]), iso, f"{day:02}/{month:02}/{year}")
    name = MONTHS[language][month - 1]
    written = WRITTEN_DATE[language].format(day=day, month=name, year=year)
    return Task(dice.pick(TO_ISO[language]), written, iso)


ASCENDING: Final = Both(
    (
        "Ordena los números de menor a mayor.",
        "Pon estos números en orden creciente.",
        "Ordena la lista de menor a mayor.",
    ),
    (
        "Sort the numbers from smallest to largest.",
        "Put these numbers in ascending order.",
        "Sort the list from smallest to largest.",
    ),
)
DESCENDING: Final = Both(
    (
        "Ordena los números de mayor a menor.",
        "Pon estos números en orden decreciente.",
        "Ordena la lista de mayor a menor.",
    ),
    (
        "Sort the numbers from largest to smallest.",
        "Put these numbers in descending order.",
        "Sort the list from largest to smallest.",
    ),
)


def draw_sorting(language: Language, dice: Dice) -> Task:
    """Sort three or four different one-digit numbers, up or down."""
    numbers = dice.shuffled(range(10))[: dice.between(3, 4)]
    down = dice.below(2) == 1
    instruction = dice.pick((DESCENDING if down else ASCENDING)[language])
    ordered = sorted(numbers, reverse=down)
    return Task(instruction, ", ".join(map(str, numbers)), ", ".join(map(str, ordered)))


NAMES: Final = (
    "Ana",
    "Luis",
    "Marta",
    "Pablo",
    "Elena",
    "Diego",
    "Lucía",
    "Mateo",
    "Nuria",
    "Andrés",
    "Emma",
    "Jack",
    "Olivia",
    "Harry",
    "Grace",
    "Oscar",
    "Alice",
    "Henry",
    "Ruby",
    "Thomas",
)
CITIES: Final = Both(
    (
        "Sevilla",
        "Valencia",
        "Bilbao",
        "Granada",
        "Málaga",
        "Murcia",
        "Toledo",
        "Córdoba",
        "Cádiz",
        "Lima",
        "Bogotá",
        "Quito",
    ),
    (
        "London",
        "Leeds",
        "Bristol",
        "Oxford",
        "York",
        "Dublin",
        "Glasgow",
        "Boston",
        "Denver",
        "Austin",
        "Toronto",
        "Sydney",
    ),
)
GREETINGS: Final = Both(
    (
        "Saluda a {name}; son las {time}.",
        "Son las {time}. Escribe un saludo para {name}.",
        "Escribe a {name} un saludo para las {time}.",
        "¿Cómo saludarías a {name} a las {time}?",
    ),
    (
        "Greet {name}; it is {time}.",
        "It is {time}. Write a greeting for {name}.",
        "Write {name} a greeting for {time}.",
        "How would you greet {name} at {time}?",
    ),
)
PARTS_OF_DAY: Final = Both(
    ("Buenos días", "Buenas tardes", "Buenas noches"), ("Good morning", "Good afternoon", "Good evening")
)
HOURS: Final = ((7, 11), (14, 17), (21, 23))


def draw_greeting(language: Language, dice: Dice) -> Task:
    """Greet a person by name in the words of the hour."""
    name, part = dice.pick(NAMES), dice.below(len(HOURS))
    time = f"{dice.between(*HOURS[part]):02}:{dice.below(12) * 5:02}"
    instruction = dice.pick(GREETINGS[language]).format(name=name, time=time)
    return Task(instruction, "", f"{PARTS_OF_DAY[language][part]}, {name}.")


EXTRACTIONS: Final = Both(
    (
        "Extrae nombre, edad y ciudad en JSON.",
        "Devuelve en JSON el nombre, la edad y la ciudad.",
        "Saca del texto nombre, edad y ciudad como JSON.",
    ),
    (
        "Extract name, age and city as JSON.",
        "Return the name, age and city as JSON.",
        "Pull name, age and city out of the text as JSON.",
    ),
)
PROFILES: Final = Both(
    (
        "{name} tiene {age} años y vive en {city}.",
        "Me llamo {name}, vivo en {city} y tengo {age} años.",
        "En {city} vive {name}, de {age} años.",
        "Con {age} años, {name} trabaja en {city}.",
        "{name} ({age}) acaba de mudarse a {city}.",
    ),
    (
        "{name} is {age} years old and lives in {city}.",
        "My name is {name}, I live in {city} and I am {age}.",
        "In {city} lives {name}, aged {age}.",
        "At {age}, {name} works in {city}.",
        "{name} ({age}) has just moved to {city}.",
    ),
)
JSON_KEYS: Final = Both(("nombre", "edad", "ciudad"), ("name", "age", "city"))
JSON_ONLY: Final = Both("Responde solo con JSON.", "Answer with JSON only.")


def draw_extraction(language: Language, dice: Dice) -> Task:
    """Find a name, an age and a city in a sentence and give them as JSON."""
    name, age, city = dice.pick(NAMES), dice.between(18, 89), dice.pick(CITIES[language])
    sentence = dice.pick(PROFILES[language]).format(name=name, age=age, city=city)
    answer = json.dumps(dict(zip(JSON_KEYS[language], (name, age, city), strict=True)), ensure_ascii=False)
    system = JSON_ONLY[language] if dice.below(4) == 0 else None
    return Task(dice.pick(EXTRACTIONS[language]), sentence, answer, system)
