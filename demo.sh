#!/usr/bin/env bash
# The whole system on a synthetic city and a small pretrained LLM: raw check-ins to Acc@k, on a CPU.
#
#     make demo
#
# The commands are those of the README, with short prompts and few steps, in a city made easy: `-jitter 0` lets a habit
# recur at the same second, so that the target's time can be matched with the prompt's. Run again, it goes on where it
# stopped; `rm -r runs/demo` starts it anew.
set -euo pipefail
cd "$(dirname "$0")"

MODEL=models/smollm2-135m
DATA=datasets/sample/preprocessed
MAPPING=$DATA/sample_gps_mapping.csv
STAGE_1=runs/demo/stage1
STAGE_2=runs/demo/stage2
STEPS_1=10
STEPS_2=70

step() { printf '\n== %s\n' "$*"; }

step "A synthetic city"
python data-preprocess/make_sample_raw.py -jitter 0

step "The embedded model"
python tools/get_smollm2.py --output_dir $MODEL

step "Check-ins to samples, samples to questions"
python data-preprocess/run.py -f best_conf/sample.yml
python data-preprocess/traj_qk.py -dataset_name sample
python data-preprocess/process_projector_gps_stage1.py -dataset_name sample -use_sim False \
    -fields coordinates,gps -max_history 2
python data-preprocess/process_llm_gps.py -dataset_name sample -use_sim False \
    -fields clock,gps -max_history 8

COMMON="--model_name_or_path $MODEL --gps_mapping_path $MAPPING --model_max_length 320 --low_rank_training True
    --bf16 True --load_in_4bit False --activation_checkpointing False --use_flash_attn True
    --per_device_train_batch_size 4 --train_sampling_strategy group_by_length
    --evaluation_strategy no --save_strategy steps --save_total_limit 1 --logging_steps 5
    --weight_decay 0.0 --lr_scheduler_type linear --resume_from_checkpoint auto"

step "Stage 1: the geo-encoder learns to tell the LLM where a place is"
torchrun --nproc_per_node=1 --master_port=29501 finetune_GCIM.py $COMMON --output_dir $STAGE_1 \
    --data_path $DATA/train_qa_pairs_kqt_200items_sample_projector_gps_without_sim_stage1.json \
    --lora_r 16 --lora_alpha 32 --learning_rate 5e-4 --warmup_steps 5 --max_steps $STEPS_1 --save_steps $STEPS_1

# --trainable_params norm: the embeddings stay as they are, since this learning rate is 50 times the paper's.
step "Stage 2: the LLM learns to predict the next POI"
torchrun --nproc_per_node=1 --master_port=29502 finetune_LLM_with_GCIM.py $COMMON --output_dir $STAGE_2 \
    --data_path $DATA/train_qa_pairs_kqt_200items_sample_llm_without_sim_gps.json \
    --geoencoder_path $STAGE_1/$STEPS_1/geo_encoder_merged.pth \
    --lora_dropout 0 --trainable_params norm --learning_rate 1e-3 --warmup_steps 5 \
    --max_steps $STEPS_2 --save_steps $STEPS_2

step "Test: every POI is ranked for every test question"
python test_next_gps.py --base_model $MODEL --output_dir $STAGE_2/checkpoint-$STEPS_2 --dataset_name sample \
    --gps_mapping_path $MAPPING --geoencoder_path $STAGE_1/$STEPS_1/geo_encoder_merged.pth \
    --seq_len 320 --context_size 320 --batch_size 8 --dtype bfloat16 --flash_attn True --test_type llm

step "Look at it: both pages open in any browser, without network"
python report.py --output_dir $STAGE_2/checkpoint-$STEPS_2
