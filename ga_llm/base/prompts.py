"""The wording of questions and answers: the one template that preprocessing writes and evaluation reads.

A pair reads, on one line (paper, Section 4: prompt construction):

    <question>: [Similar trajectories: …] [History of user u: …] Current trajectory of user u: … the question
    <answer>: the answer

Whoever reads it relies on `<question>:`, `<answer>:`, `POI id n`, `<GPS n>`, `<POI n>` and `<TIME n>` alone, so files
in another wording work too. (Evaluation also reads the user, the target's time and the current part, where they stand
as here.) Where there are several `<answer>:`, as behind examples of answers, the last one counts.
"""
import bisect
import re
from collections.abc import Container, Sequence

QUESTION = "<question>:"
ANSWER = "<answer>:"
# What names a place that may be asked for: `POI id n`, or `<GPS n>` where it stands directly behind a `<TIME n>`.
POI_ID = re.compile(r"(?:POI id |<TIME [^<>]*><GPS )([0-9]+)")
GPS_TOKEN = re.compile(r"<GPS ([^<>]*)>")       # whatever looks like one: `<GPS 05>` must not pass for text
POI_TOKEN = re.compile(r"<POI ([^<>]*)>")
TIME_TOKEN = re.compile(r"<TIME ([^<>]*)>")
PLACE_TOKEN = re.compile(r"<(?:GPS|POI|TIME) [^<>]*>")      # any of the three
CURRENT = "Current trajectory of user"
USER = re.compile(r"user ([0-9]{1,18})(?![0-9])")       # a number of 64 bits
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
LONGEST_ID = 18     # digits; more are no number of 64 bits

# What a check-in may show, in the order of the prompt. `poi` is always shown: it is what is predicted.
FIELDS = ("time", "user", "poi", "coordinates", "gps", "category")
# Instead of `time`, for short prompts: the time of day alone.
CLOCK = "clock"
# With the POI Alignment Module: `<POI n>`, behind `POI id n`.
ALIGNED = "poi_token"
# A check-in in two tokens, `<TIME n><GPS n>`: weekday, half hour and time since the check-in before; and the place.
# With the POI Alignment Module in three, `<TIME n><GPS n><POI n>`; with `category` its name is text behind them.
MOMENT = "moment"
MOMENT_FIELDS = (MOMENT, "gps")
HALF_HOURS = 48         # a day
# The time since the check-in before, at least so many minutes; the last four are 1, 2, 4 and 8 weeks.
STEPS = (0, 5, 15, 30, 60, 120, 240, 480, 960, 1440, 2880, 5760, 10080, 20160, 40320, 80640)
GAPS = len(STEPS) + 1   # these, and "none"
MOMENTS = 7 * HALF_HOURS * GAPS
MONDAY = 3              # 1970-01-01 was a Thursday, day 3 of a week that begins on Monday
ORDER = (MOMENT, CLOCK, "time", "user", "poi", ALIGNED, "coordinates", "gps", "category")
STAGE_1_FIELDS = tuple(field for field in FIELDS if field != "category")


def gps_token(gps_id: int) -> str:
    """The token whose embedding GCIM replaces: `<GPS n>`, n being the encoded POI id."""
    return f"<GPS {gps_id}>"


def poi_token(poi: int) -> str:
    """The token whose embedding PAM replaces: `<POI n>`, n being the encoded POI id."""
    return f"<POI {poi}>"


def time_token(moment: int) -> str:
    """The token of a moment, as `moments` numbers them."""
    return f"<TIME {moment}>"


def unknown_place(text: str, places: Container[str]) -> str | None:
    """The first `<GPS …>`, `<POI …>` or `<TIME …>` in `text` that is none of the tokens `places`: `<GPS 05>` is not
    `<GPS 5>`."""
    return next((token[0] for token in PLACE_TOKEN.finditer(text) if token[0] not in places), None)


def moments(seconds: Sequence[int]) -> list[int]:
    """Number the moments of check-ins that are shown in a row: (weekday · 48 + half hour) · 17 + step since the last.

    seconds: of each, local, since 1970. Step 16 is that of the first, which has none before it.
    """
    found, before = [], None
    for second in seconds:
        gap = GAPS - 1 if before is None else max(0, bisect.bisect_right(STEPS, (second - before) / 60) - 1)
        day, half_hour = (second // 86400 + MONDAY) % 7, second % 86400 // 1800
        found.append((day * HALF_HOURS + half_hour) * GAPS + gap)
        before = second
    return found


def in_tokens(texts: Sequence[str], seconds: Sequence[int], last: int | None = None) -> tuple[list[str], str]:
    """Check-ins that are shown in a row, each behind its `<TIME n>`; the target's is the second result.

    seconds: of each, local, since 1970; last: of the target.
    """
    tokens = [time_token(moment) for moment in moments([*seconds] + [last] * (last is not None))]
    return [token + text for token, text in zip(tokens, texts)], tokens[-1] if last is not None else ""


def check_in(fields: Sequence[str], time: str, user: int, poi: int, latitude: float, longitude: float,
             category_name: str, category: int) -> str:
    """One check-in as text. `time` is local, `YYYY-MM-DD HH:MM:SS`; coordinates are degrees, shown to 6 decimals.

    The field `moment` is not among its own: it is whoever puts check-ins in a row that knows it (`in_tokens`).
    """
    if MOMENT in fields:
        name = f" {category_name}" if "category" in fields else ""
        return gps_token(poi) + poi_token(poi) * (ALIGNED in fields) + name
    shown = {
        CLOCK: lambda: time[11:],
        "time": lambda: time,
        "user": lambda: f"user {user}",
        "poi": lambda: f"POI id {poi}",
        ALIGNED: lambda: poi_token(poi),
        "coordinates": lambda: f"({latitude:.6f}, {longitude:.6f})",
        "gps": lambda: gps_token(poi),
        "category": lambda: f"{category_name}, category id {category}",
    }
    return " ".join(shown[field]() for field in ORDER if field in fields and field in shown) + "."


def question(user: int, similar: Sequence[str], history: Sequence[str], current: Sequence[str], ask: str) -> str:
    """The prompt from check-in texts. An empty part is left out, its heading too."""
    parts = [QUESTION]
    for heading, check_ins in (("Similar trajectories:", similar), (f"History of user {user}:", history),
                               (f"{CURRENT} {user}:", current)):
        if check_ins:
            parts.append(heading)
            parts.extend(check_ins)
    parts.append(ask)
    return " ".join(parts)


def ask_poi(time: str, user: int, first_id: int, last_id: int) -> str:
    """Stage 2 and evaluation: where will the user be at the target's time?"""
    return f"At {time}, which POI will user {user} visit? POI ids range from {first_id} to {last_id}."


def answer_poi(time: str, user: int, poi: int, moment: str = "", as_token: bool = False) -> str:
    """The answer. moment: with the field `moment` the target's `<TIME n>`. as_token: `<GPS n>` for `POI id n`, one
    token."""
    return f"{ANSWER} At {time}, user {user} will visit {moment}{gps_token(poi) if as_token else f'POI id {poi}'}."


def ask_coordinates(poi: int) -> str:
    """Stage 1: what does the encoder's vector say? The token is the *target's*.

    Departure from the released code, which inserts the previous check-in's token and asks for the target's place.
    """
    return f"What are the coordinates of {gps_token(poi)}?"


def answer_coordinates(latitude: float, longitude: float) -> str:
    return f"{ANSWER} Latitude {latitude:.6f}, longitude {longitude:.6f}."


def ask_id(poi: int) -> str:
    """PAM's stage 1: what does the projected embedding say of a POI? Here its id."""
    return f"Which POI is {poi_token(poi)}?"


def answer_id(poi: int) -> str:
    return f"{ANSWER} POI id {poi}."


def answer_id_and_coordinates(poi: int, latitude: float, longitude: float) -> str:
    """To both questions at once, for training GCIM and PAM together."""
    return f"{ANSWER} POI id {poi}. Latitude {latitude:.6f}, longitude {longitude:.6f}."


def ask_category(poi: int) -> str:
    return f"Of which category is {poi_token(poi)}?"


def answer_category(category_name: str, category: int) -> str:
    return f"{ANSWER} {category_name}, category id {category}."


def ask_successors(poi: int) -> str:
    return f"Where do people go most often after {poi_token(poi)}?"


def answer_successors(pois: Sequence[int]) -> str:
    """The POIs that follow most often, the most frequent first."""
    return f"{ANSWER} {', '.join(f'POI id {poi}' for poi in pois)}."


def join(question: str, answer: str) -> str:
    """One pair on one line: what a test file holds and what training reads."""
    return f"{question.rstrip()} {answer.lstrip()}"


def split(pair: str) -> tuple[str, str]:
    """Cut a joined pair into the prompt (up to and with `<answer>:`) and the answer's text.

    Raises ValueError if there is no `<answer>:`.
    """
    prompt, marker, answer = pair.rpartition(ANSWER)
    if not marker:
        raise ValueError(f"no {ANSWER}")
    return prompt + marker, answer
