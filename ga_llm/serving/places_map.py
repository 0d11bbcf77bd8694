"""A map of recommended places, beside the check-ins that they follow from: one HTML page, by folium."""
import math
from collections import Counter
from collections.abc import Sequence

import folium
import numpy as np

from ga_llm.base import globe

PAST, LAST, PLACE = "#6b7280", "#111827", "#b91c1c"     # grey, black, red
LEAST, MOST = 20, 56    # pixels across of a recommended place


def draw(found: Sequence[dict], past: Sequence[dict], title: str) -> str:
    """The page. found: as `recommendation.describe` gives it; past: `visits`, in order.

    The best place is the largest, the others' areas are in proportion to their probability, down to a least size.
    """
    around = globe.middle(np.array([row["longitude"] for row in (*found, *past)]))     # longitudes run on across ±180°
    found, past = ([row | {"longitude": float(globe.turned(row["longitude"], around))} for row in rows]
                   for rows in (found, past))
    page = folium.Map(tiles="OpenStreetMap", control_scale=True)
    of_place = {(row["latitude"], row["longitude"]): row for row in past}      # the latest visit of each
    visits = Counter((row["latitude"], row["longitude"]) for row in past)
    for place, row in of_place.items():
        is_last = row is past[-1]
        times = f"{visits[place]} check-ins, the last" if visits[place] > 1 else "check-in"
        folium.CircleMarker(place, radius=7 if is_last else 5, color=LAST if is_last else PAST, weight=2, fill=True,
                            fill_opacity=0.9 if is_last else 0.5,
                            tooltip=_safe(f"{_called(row)} ({row['id']}): {times} {row['time']}")).add_to(page)
    for row in found:
        size = round(max(LEAST, MOST * math.sqrt(row["probability"] / found[0]["probability"])))
        text = f"{row['rank']}. {_called(row)} ({row['id']}): {100 * row['probability']:.2f} %, {row['km']:.2f} km"
        icon = folium.DivIcon(icon_size=(size, size), icon_anchor=(size // 2, size // 2), class_name="place",
                              html=str(row["rank"]))
        folium.Marker((row["latitude"], row["longitude"]), icon=icon, tooltip=_safe(text),
                      z_index_offset=1000 * row["rank"]).add_to(page)       # the small ones on top
    points = [(row["latitude"], row["longitude"]) for row in (*found, *past)]
    page.fit_bounds([[min(axis) for axis in zip(*points)], [max(axis) for axis in zip(*points)]], padding=(40, 40),
                    max_zoom=16)
    page.get_root().title = _safe(title)
    page.get_root().header.add_child(folium.Element(STYLE))
    page.get_root().html.add_child(folium.Element(_legend(found, title)))
    return page.get_root().render()


STYLE = f"""<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
div.leaflet-marker-icon.place {{ display: flex; align-items: center; justify-content: center; border-radius: 50%;
  background: {PLACE}d0; border: 2px solid white; color: white; font: bold 13px sans-serif; box-sizing: border-box; }}
#legend {{ position: fixed; right: 10px; top: 10px; z-index: 1000; max-width: 340px; max-height: 45%; overflow: auto;
  background: white; padding: 8px 12px; border-radius: 6px; box-shadow: 0 1px 4px #0006; font: 13px/1.4 sans-serif; }}
#legend ol {{ margin: 4px 0; padding-left: 22px; }}
#legend i {{ display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 4px; }}
@media (max-width: 600px) {{ #legend {{ left: 10px; top: auto; bottom: 66px; max-width: none; max-height: 32%; }} }}
</style>"""


def _legend(found: Sequence[dict], title: str) -> str:
    rows = "".join(f"<li>{_safe(_called(row))}, {100 * row['probability']:.2f} %, {row['km']:.2f} km</li>"
                   for row in found)
    return (f'<div id="legend"><b>{_safe(title)}</b><ol>{rows}</ol><i style="background:{PAST}"></i>check-ins '
            f'<i style="background:{LAST}"></i>the last one; km are from there</div>')


def _called(row: dict) -> str:
    """Its name, where it has one, and its category."""
    return f"{row['name']}, {row['category']}" if row.get("name") else row["category"]


def _safe(text: str) -> str:
    """Text that neither HTML nor the JavaScript that folium writes it into takes for anything else."""
    return "".join(char if char.isalnum() or char in " .,-" else f"&#{ord(char)};" for char in text)
