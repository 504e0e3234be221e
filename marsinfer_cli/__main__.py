from marsinfer_cli.app import main

main()
