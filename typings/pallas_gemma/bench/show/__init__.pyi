from bench.show import beside as beside
from bench.show import compare as compare
from bench.show import files as files
from bench.show import published as published
from bench.show import report as report
from bench.show import table as table
from bench.show import train_step as train_step
