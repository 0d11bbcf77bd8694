"""The GPS mapping: where each POI lies, by its id; and the places' own names."""
import numpy as np
import pandas as pd

from ga_llm.base import artifacts, globe


def places(train: pd.DataFrame) -> pd.DataFrame:
    """GPS_id, Latitude, Longitude (degrees): one row per POI of train, in id order, the mean of its check-ins.

    Departure from the released code: GPS_id is the encoded POI id, and whoever looks a place up does so by id. There
    the lookup is by position, which shifts by one where ids start at 1.
    """
    poi, points = train["PoiId"], _on_sphere(train["Latitude"] * 0, train["Longitude"])
    around = np.degrees(np.arctan2(*(points[axis].groupby(poi).mean() for axis in "yx")))
    # A mean of 179.9 and -179.9 is 180, not 0.
    together = train.assign(Longitude=globe.turned(train["Longitude"], poi.map(around)))
    means = together.groupby("PoiId")[["Latitude", "Longitude"]].mean()
    means["Longitude"] = globe.wrapped(means["Longitude"])
    at_pole = means["Latitude"].abs() > globe.POLAR     # where the mean of degrees lies beside the places
    if at_pole.any():
        rows = train[poi.map(at_pole)]
        points = _on_sphere(rows["Latitude"], rows["Longitude"]).groupby(rows["PoiId"]).mean()
        means.loc[at_pole, "Latitude"] = np.degrees(np.arctan2(points["z"], np.hypot(points["x"], points["y"])))
        means.loc[at_pole, "Longitude"] = np.degrees(np.arctan2(points["y"], points["x"]))
    return means.rename_axis("GPS_id").reset_index()


def names(train: pd.DataFrame) -> pd.DataFrame:
    """poi (as in the raw file), name: of each POI of train that has names the most frequent, of equals the first.

    In the order of the ids. It is no part of the released mapping, so it has a file of its own.
    """
    named = train[train["PoiName"] != ""]
    counts = named.groupby(["PoiId", "PoiName"], sort=False).size().reset_index(name="n")
    best = counts.sort_values("n", ascending=False, kind="stable").drop_duplicates("PoiId").sort_values("PoiId")
    return best[["PoiId", "PoiName"]].set_axis(artifacts.NAME_COLUMNS, axis=1)


def _on_sphere(latitude: pd.Series, longitude: pd.Series) -> pd.DataFrame:
    """Points of the unit sphere: x, y, z."""
    north, east = np.radians(latitude), np.radians(longitude)
    return pd.DataFrame({"x": np.cos(north) * np.cos(east), "y": np.cos(north) * np.sin(east), "z": np.sin(north)})
