"""The seven tasks of SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610): their names in files, and in words."""

TASKS = {
    "add_obj": "add object",
    "add_att": "add attribute",
    "replace_obj": "replace object",
    "replace_att": "replace attribute",
    "replace_rel": "replace relation",
    "swap_obj": "swap objects",
    "swap_att": "swap attributes",
}
