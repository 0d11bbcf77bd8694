"""Samples → a vector for each POI, of where people go from there and where they come from (PAM).

    python data-preprocess/poi_embeddings.py -dataset_name nyc
    python data-preprocess/poi_embeddings.py -dataset_name nyc -from sthgcn.npy     # another model's

Made of train's transitions alone and, as the flags say, of which places lie near each other. Writes
<data set>_poi_embeddings.npy (float32, highest id + 1 × 128; row n is POI n's) and, beside it,
<data set>_poi_embeddings.json: what it was made of.
"""
from pathlib import Path

from checkins import config, transitions
from ga_llm.base import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    config.add_flags(parser)
    neighbours = cli.whole_number(0, 1000)
    parser.add_argument("-geo_neighbours", type=neighbours, metavar="K",
                        help=f"how many nearest places count as near (default: {transitions.GEO_NEIGHBOURS})")
    parser.add_argument("-category_neighbours", type=neighbours, metavar="K",
                        help="how many nearest places of the same category count as near (default: 0)")
    parser.add_argument("-from", dest="source", type=Path, metavar="FILE.npy",
                        help="take another model's vectors; row n is encoded POI id n's, 128 numbers")
    args = parser.parse_args()
    if args.source is not None and (args.geo_neighbours, args.category_neighbours) != (None, None):
        parser.error("-from takes vectors as they are; leave -geo_neighbours and -category_neighbours out")
    geo = transitions.GEO_NEIGHBOURS if args.geo_neighbours is None else args.geo_neighbours
    transitions.write_embeddings(config.from_flags(args), geo, args.category_neighbours or 0, args.source)


if __name__ == "__main__":
    cli.run(main)
