from marsinfer_cli.place import leave_out_working_folder

leave_out_working_folder()

from marsinfer_cli.start import main  # noqa: E402

main()
