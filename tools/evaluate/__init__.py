"""Quality of plans on prompts never calibrated on."""
