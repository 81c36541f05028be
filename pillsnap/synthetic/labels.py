"""The label JSON of one pill in one photograph."""

from __future__ import annotations

import unicodedata
from typing import Any

from pillsnap.synthetic.catalog import Pill
from pillsnap.synthetic.layout import DIRECTIONS, LIGHTS, SIZE, PhotoPlan
from pillsnap.synthetic.render import photo_rng


def label_json(
    plan: PhotoPlan, pill: Pill, box: tuple[int, int, int, int], frame: tuple[int, int], suffix: str, seed: int
) -> dict[str, Any]:
    """Content of one pill's label file; as in AI Hub's files, some fields vary in type between files."""
    rng = photo_rng(seed, f"{plan.stem}/{pill.code}")
    look, file_name = pill.look, plan.stem + suffix
    front, back = (text.replace("|", "분할선") for text in pill.prints)
    capsule = look.shape == "캡슐"

    def number(value: float) -> float | str:
        return str(value) if rng.random() < 0.5 else value

    image = {
        "file_name": file_name,
        "width": frame[0],
        "height": frame[1],
        "imgfile": file_name,
        "drug_N": pill.code,
        "drug_S": "정상알약",
        "back_color": "연회색 배경",
        "drug_dir": DIRECTIONS[plan.direction],
        "light_color": LIGHTS[plan.light],
        "camera_la": plan.latitude,
        "camera_lo": plan.longitude,
        "size": SIZE,
        "dl_idx": str(int(pill.code.removeprefix("K-")) - 1),
        "dl_mapping_code": pill.code,
        "dl_name": unicodedata.normalize("NFD" if rng.random() < 0.1 else "NFC", pill.name),
        "dl_name_en": pill.name_en,
        "img_key": "",
        "dl_material": pill.material,
        "dl_material_en": pill.material_en,
        "dl_custom_shape": "경질캡슐제, 산제" if capsule else "정제, 저작정" if not look.glossy else "필름코팅정",
        "dl_company": pill.company,
        "dl_company_en": pill.company_en,
        "di_company_mf": "",
        "di_company_mf_en": "",
        "item_seq": number(pill.item_seq),
        "di_item_permit_date": f"{pill.item_seq // 100_000}0614",
        "di_class_no": "[01140]해열.진통.소염제",
        "di_etc_otc_code": "전문의약품",
        "di_edi_code": pill.edi_code,
        "chart": f"{look.colour} {'경질캡슐' if capsule else look.shape + ' 정제'}",
        "drug_shape": "장방형" if capsule else look.shape,
        "thick": number(look.thick_mm),
        "leng_long": number(look.long_mm),
        "leng_short": number(look.short_mm),
        "print_front": front,
        "print_back": back,
        "color_class1": look.colour,
        "color_class2": look.second_colour,
        "line_front": "-" if pill.scored[0] else "",
        "line_back": "-" if pill.scored[1] else "",
        "img_regist_ts": "20200101",
        "form_code_name": "경질캡슐제" if capsule else "필름코팅정" if look.glossy else "나정",
        "mark_code_front_anal": "",
        "mark_code_back_anal": "",
        "mark_code_front_img": "",
        "mark_code_back_img": "",
        "mark_code_front": "",
        "mark_code_back": "",
        "change_date": "20200313",
        "id": 1,
    }
    annotation = {
        "area": box[2] * box[3],
        "iscrowd": 0,
        "bbox": list(box),
        "category_id": 1,
        "ignore": 0,
        "segmentation": [],
        "id": 1,
        "image_id": 1,
    }
    categories = [{"supercategory": "pill", "id": 1, "name": "Drug"}]
    return {"images": [image], "type": "instances", "annotations": [annotation], "categories": categories}
