

def write_page(path, runtime, report):
    pass
