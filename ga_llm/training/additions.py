"""What stage 2 trains beside the LLM where its flags ask for it (`llm.beside`), none of it in the paper."""
import dataclasses
import logging

import torch

from ga_llm.base.cli import UserError
from ga_llm.base.sharding import gathered
from ga_llm.llm import beside, pointer, pointing
from geo_encoder import place_rows
from geo_encoder.encoder import GeoEncoderConfig

log = logging.getLogger(__name__)


def check(args) -> None:
    """Raises UserError for flags that exclude each other."""
    if args.geo_encoder and args.geoencoder_path:
        raise UserError("--geo_encoder, --geoencoder_path: a new encoder or stage 1's; give one of them")
    if args.geo_output and args.geoencoder_path:
        raise UserError("--geo_output True: trains an encoder of its own; give --geo_encoder, not --geoencoder_path")
    if args.geo_encoder and not (args.geo_output or args.train_encoders):
        raise UserError("--geo_encoder: an encoder that has learned nothing must be trained; add --train_encoders True "
                        "or --geo_output True")
    if args.encode_each and not args.train_encoders:
        raise UserError("--encode_each True: frozen encoders are tables, without dropout; add --train_encoders True")
    if args.pointer_without and not args.pointer:
        raise UserError("--pointer_without: goes with --pointer True")
    for name in args.pointer_without.split(",") if args.pointer_without else ():
        if name not in pointer.BIASES:
            raise UserError(f"--pointer_without {name[:60]}: unknown; choose among {','.join(pointer.BIASES)}")


def attach(args, setup) -> None:
    """Put on the LLM of `setup` what `args` ask for. After LoRA."""
    llm, mapping = setup.model, setup.mapping
    width = llm.get_input_embeddings().embedding_dim
    if setup.time_token_ids is not None:
        beside.add_moments(llm, setup.time_token_ids)
    categories = None
    if setup.check_ins is not None:
        categories = torch.from_numpy(setup.check_ins.categories(len(mapping.ids)))
    if args.geo_output:
        encoder = dataclasses.asdict(GeoEncoderConfig(width, args.geo_encoder)) if args.geo_encoder else None
        config = place_rows.PlaceRowsConfig(width, int(categories.max()) + 1, encoder)
        rows = place_rows.PlaceRows(config, mapping, setup.token_ids)
        rows.categories.copy_(categories)
        _apart(llm, setup.token_ids)
        place_rows.attach(llm, rows)
    if args.pointer:
        without = {name: False for name in pointer.BIASES if name in args.pointer_without.split(",")}
        made = pointer.Pointer(pointer.PointerConfig(width, args.pointer_heads, **without), mapping, args.dropout)
        made.categories.copy_(categories)
        pointing.attach(llm, made)


@torch.no_grad()
def _apart(llm, token_ids, std: float = .02) -> None:
    """Let the places' own rows, which all begin at the mean of the others, begin different."""
    for weight in {id(layer.weight): layer.weight for layer in (
            llm.get_input_embeddings(), llm.get_output_embeddings())}.values():
        with gathered([weight], write=True):
            if len(weight):
                weight[torch.from_numpy(token_ids)] += std * torch.randn(
                    len(token_ids), weight.shape[1], dtype=weight.dtype).to(weight.device)
