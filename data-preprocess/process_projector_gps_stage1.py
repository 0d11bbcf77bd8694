"""Samples → stage-1 questions (GCIM): where is the target's GPS token?

    python data-preprocess/process_projector_gps_stage1.py -dataset_name nyc -use_sim False

Writes {train,test}_qa_pairs_kqt_200items_<data set>_projector_gps_{with,without}_sim_stage1.{json,txt}.
"""
from checkins import questions
from ga_llm.base import cli

if __name__ == "__main__":
    cli.run(lambda: questions.command(stage=1, description=__doc__))
