"""Degrees on a globe: 180° west is 180° east, and at the poles all meridians meet.

Whoever averages, frames or draws longitudes as plain numbers turns them to one side first. What is on that side already
keeps its bits.
"""
from collections.abc import Callable

import numpy as np

POLAR = 85.05112878     # degrees north or south; beyond it no quadkey tells places apart, and degrees east say little


def turned(longitude, around):
    """The same meridians, at most 180° from `around`: what -180…180 tears apart lies together."""
    return longitude + 360 * np.round((around - longitude) / 360)


def wrapped(longitude):
    """The same meridians, from -180 to 180."""
    return longitude - 360 * np.round(longitude / 360)


def in_box(latitude, longitude, south: float, west: float, north: float, east: float) -> np.ndarray:
    """Which points lie between two parallels and two meridians, borders included. A box whose west is east of its east
    goes on across ±180°.
    """
    width = east - west if west < east else east - west + 360
    return (latitude >= south) & (latitude <= north) & ((longitude - west) % 360 <= width)


def middle(longitude: np.ndarray) -> float:
    """The middle of the shortest arc that holds all of them, at least one; from -180 to 180."""
    longitude = np.unique(longitude)
    longitude = longitude[np.argsort(longitude % 360, kind="stable")]
    gaps = np.diff(longitude % 360, append=longitude[0] % 360 + 360)
    first = longitude[(gaps.argmax() + 1) % len(longitude)]
    return float(wrapped(first + (360 - gaps.max()) / 2))


def flat(points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A map that suits some points: a function from longitude and latitude, (n, 2), to x and y, (n, 2).

    Both in degrees of latitude, so that a round place is round. Longitudes run on across ±180°. Around a pole the map
    is seen from above it (azimuthal equidistant); elsewhere meridians are as far apart as halfway up (equirectangular).
    nan stays nan.
    """
    longitude, latitude = points[~np.isnan(points).any(axis=1)].reshape(-1, 2).T
    if not len(latitude):
        return lambda lonlat: lonlat
    centre, halfway = middle(longitude), (latitude.min() + latitude.max()) / 2
    if abs(halfway) <= POLAR:
        stretch = np.cos(np.radians(halfway))
        return lambda lonlat: np.column_stack([turned(lonlat[:, 0], centre) * stretch, lonlat[:, 1]])
    pole = np.sign(halfway)

    def from_above(lonlat: np.ndarray) -> np.ndarray:
        angle, away = np.radians(lonlat[:, 0]), 90 - pole * lonlat[:, 1]
        return np.column_stack([away * np.sin(angle), -pole * away * np.cos(angle)])
    return from_above
