"""Samples → stage-2 questions (LLM): which POI will the user visit?

    python data-preprocess/process_llm_gps.py -dataset_name nyc -use_sim False

Writes {train,test}_qa_pairs_kqt_200items_<data set>_llm_{with,without}_sim_gps.{json,txt}.
"""
from checkins import questions
from ga_llm.base import cli

if __name__ == "__main__":
    cli.run(lambda: questions.command(stage=2, description=__doc__))
