#!/usr/bin/env bash
# The whole system on a synthetic city, raw check-ins to Acc@k on a CPU: a small LLM from scratch with the pointer, which
# is better than every baseline, and the paper's recipe with a pretrained LLM, for as long as a demo may take.
#
#     make demo
#
# The commands are those of the README and of docs/pointer.md, with fewer steps. Run again, it goes on where it stopped;
# `rm -r runs/demo` starts it anew.
set -euo pipefail
cd "$(dirname "$0")"

POINTER=datasets/demo/sample/preprocessed
DATA=datasets/sample/preprocessed
MAPPING=$DATA/sample_gps_mapping.csv
TRAIN=train_qa_pairs_kqt_200items_sample_llm_without_sim_gps.json
SMALL=runs/demo/small_llm
MODEL=models/smollm2-135m
STAGE_1=runs/demo/stage1
STAGE_2=runs/demo/stage2
STEPS_0=40
STEPS_1=8
STEPS_2=30

step() { printf '\n== %s\n' "$*"; }

step "A synthetic city, whose people have habits in time and space"
python data-preprocess/make_sample_raw.py -users 260

step "Check-ins to samples; to questions in two tokens a check-in"
python data-preprocess/run.py -f best_conf/sample.yml -datasets datasets/demo
python data-preprocess/process_llm_gps.py -dataset_name sample -use_sim False -datasets datasets/demo \
    -fields moment,gps -answer token -cover True -thinned 4 -missing 0.2

step "A small LLM from scratch, with the pointer"
[ -e $SMALL/config.json ] || python tools/make_tiny_llama.py --words $POINTER/$TRAIN --vocab_size 3000 --hidden 128 \
    --layers 2 --heads 4 --tie_embeddings True --initializer_range 0.05 --output_dir $SMALL
python finetune_LLM_with_GCIM.py --model_name_or_path $SMALL --output_dir runs/demo/pointer \
    --data_path $POINTER/$TRAIN --gps_mapping_path $POINTER/sample_gps_mapping.csv \
    --pointer True --geo_output True --geo_encoder cells --loss_on poi_ids --batch_tokens 4096 \
    --model_max_length 2048 --low_rank_training False --load_in_4bit False --bf16 True --use_full_attn True \
    --activation_checkpointing False --dropout 0.3 --learning_rate 3e-3 --adam_beta2 0.98 --weight_decay 0.05 \
    --lr_scheduler_type cosine --warmup_steps 0.08 --max_steps $STEPS_0 --save_steps $STEPS_0 --logging_steps 5 \
    --resume_from_checkpoint auto
python test_next_gps.py --output_dir runs/demo/pointer/checkpoint-$STEPS_0

step "The embedded model, and questions in the paper's way: short ones"
python tools/get_smollm2.py --output_dir $MODEL
python data-preprocess/run.py -f best_conf/sample.yml
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
    --data_path $DATA/$TRAIN --geoencoder_path $STAGE_1/$STEPS_1/geo_encoder_merged.pth \
    --lora_dropout 0 --trainable_params norm --learning_rate 1e-3 --warmup_steps 5 \
    --max_steps $STEPS_2 --save_steps $STEPS_2

step "Test: every POI is ranked, for the first 100 test questions"
python test_next_gps.py --base_model $MODEL --output_dir $STAGE_2/checkpoint-$STEPS_2 --dataset_name sample \
    --gps_mapping_path $MAPPING --geoencoder_path $STAGE_1/$STEPS_1/geo_encoder_merged.pth \
    --seq_len 320 --context_size 320 --batch_size 8 --dtype bfloat16 --flash_attn True --test_type llm --limit 100

step "Look at the small LLM with the pointer: both pages open in any browser, without network"
python report.py --output_dir runs/demo/pointer/checkpoint-$STEPS_0
