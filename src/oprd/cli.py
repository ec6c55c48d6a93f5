from oprd.training.run import run
import sys
def main():
    run(sys.argv[2:])
