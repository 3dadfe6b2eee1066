"""Methods against full fine-tuning: cells, records, statistics, reports."""
